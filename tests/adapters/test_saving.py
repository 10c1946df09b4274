"""An adapter directory gives back the same model, or one clear error."""

import copy
import json
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.adapters.fingerprint import other_weights, sample_weights
from reftnoise.adapters.location import SECTIONS
from reftnoise.interventions import INTERVENTIONS, NoiseIntervention
from reftnoise.interventions.arguments import constructor_arguments
from support.models.architectures import tiny_model

NOISE = [name for name, unit in INTERVENTIONS.items() if issubclass(unit, NoiseIntervention)]
TRAINED = [name for name in INTERVENTIONS if name not in (*NOISE, "addition", "ablate")]
LOREFT = {"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}
FILES = {"reft_config.json", "reft_model.safetensors", "README.md"}

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 13, 14, 15, 16, 17, 18]])
MASK = (IDS != 0).long()
LABELS = torch.where(torch.arange(8) >= 6, IDS, -100)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def wrapped(entries: Any, base: Any = None) -> rn.ReftModel:
    config = rn.ReftConfig(representations=entries)
    return rn.get_reft_model(tiny_model() if base is None else base, config)


def train(reft_model: rn.ReftModel) -> rn.ReftModel:
    """A few steps, so that no weight is what a constructor gives."""
    before = [p.clone() for p in reft_model.parameters() if p.requires_grad]
    trained = [p for p in reft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    reft_model.train()
    for _ in range(3):
        optimizer.zero_grad()
        reft_model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    return reft_model.eval()


@torch.no_grad()
def logits(reft_model: Any) -> Tensor:
    return reft_model(input_ids=IDS, attention_mask=MASK).logits


@torch.no_grad()
def training_loss(reft_model: Any) -> Tensor:
    """In training mode, hence with dropout and noise, under one generator state."""
    torch.manual_seed(3)
    reft_model.train()
    loss = reft_model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    reft_model.eval()
    return loss


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_loading_gives_bit_equal_outputs(
    name: str, tied: bool, dtype: str, base_dtype: torch.dtype, tmp_path: Path
) -> None:
    entry: dict[str, Any] = {
        "layer": [0, 1],
        "intervention": name,
        "positions": "f2+l3",
        "tied": tied,
        "dtype": dtype,
    }
    known = constructor_arguments(INTERVENTIONS[name])
    entry |= {"dropout": 0.25} if "dropout" in known else {}
    entry |= {"act_fn": "silu"} if "act_fn" in known else {}
    entry |= {"low_rank_dimension": 3} if "low_rank_dimension" in known else {}
    reft_model = train(wrapped(entry, tiny_model().to(base_dtype)))
    reft_model.save_pretrained(tmp_path)
    base = tiny_model().to(base_dtype)
    plain = logits(base)

    loaded = rn.ReftModel.from_pretrained(base, tmp_path)

    assert loaded.reft_config == reft_model.reft_config
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(reft_model))
    assert not torch.equal(logits(loaded), plain)
    assert torch.equal(training_loss(loaded), training_loss(reft_model))
    for (key, mine), (other_key, theirs) in zip(
        reft_model.interventions.state_dict().items(),
        loaded.interventions.state_dict().items(),
        strict=True,
    ):
        assert key == other_key
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("is_alone", [True, False])
def test_noise_stays_in_the_config(name: str, is_alone: bool, tmp_path: Path) -> None:
    has_alpha = "alpha" in constructor_arguments(INTERVENTIONS[name])
    size = {"alpha": 50.0, "length": "padded"} if has_alpha else {"epsilon": 0.5}
    noise = {"intervention": name, **size, "where": "prompt"}
    reft_model = wrapped([noise] if is_alone else [LOREFT, noise])
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert noise.items() <= loaded.reft_config.to_dict()["representations"][-1].items()
    assert torch.equal(logits(loaded), logits(reft_model))
    assert torch.equal(training_loss(loaded), training_loss(reft_model))
    assert not torch.equal(training_loss(loaded), training_loss(wrapped([LOREFT])))


def test_a_ready_module_is_saved_by_name(tmp_path: Path) -> None:
    module = rn.NodireftIntervention(embed_dim=32, low_rank_dimension=4, act_fn="gelu")
    reft_model = train(wrapped({"layer": 1, "intervention": module, "positions": "all"}))
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    reft_model = train(wrapped(LOREFT))
    reft_model.save_pretrained(tmp_path)
    base = tiny_model()
    first = rn.ReftModel.from_pretrained(base, tmp_path)
    second = rn.ReftModel.load(str(tmp_path), base)  # pyreft's name and order
    assert torch.equal(logits(first), logits(reft_model))
    assert torch.equal(logits(second), logits(reft_model))


def test_a_loaded_model_is_saved_as_it_was(tmp_path: Path) -> None:
    train(wrapped(LOREFT)).save_pretrained(tmp_path / "first")
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_training_goes_on_after_a_load(tmp_path: Path) -> None:
    train(wrapped(LOREFT)).save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    before = logits(loaded)
    assert not torch.equal(logits(train(loaded)), before)
    rotation = loaded.interventions["layer_0_comp_block_output_unit_pos_nunit_1#0"].rotate_layer()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2))


# -- the directory -------------------------------------------------------------------------------


def test_the_directory_holds_config_weights_and_card(tmp_path: Path) -> None:
    base = tiny_model()
    base.config.name_or_path = "someone/a-model"
    reft_model = wrapped(LOREFT, base)
    directory = tmp_path / "a" / "new" / "one"
    reft_model.save(directory)
    assert {path.name for path in directory.iterdir()} == FILES  # no pickle among them
    description = json.loads((directory / "reft_config.json").read_text(encoding="utf-8"))
    sample = description["base_model"].pop("sample")
    assert description["base_model"].pop("vocabulary")["size"] == base.config.vocab_size
    assert description["base_model"].pop("rope_parameters") == base.config.rope_parameters
    assert sample
    for name, values in sample.items():
        weight = base.get_parameter(name).flatten().tolist()
        assert (values[0], values[-1]) == pytest.approx((weight[0], weight[-1]), abs=1e-8)
    assert description == {
        "schema_version": 1,
        "base_model": {
            "name_or_path": "someone/a-model",
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 3,
        },
        "representations": reft_model.reft_config.to_dict()["representations"],
        "base_parameters": [],
        "weights_sha256": sha256((directory / "reft_model.safetensors").read_bytes()).hexdigest(),
    }
    weights = safetensors.torch.load_file(directory / "reft_model.safetensors")
    own = {f"interventions.{n}": p for n, p in reft_model.interventions.named_parameters()}
    assert set(weights) == set(own)
    assert all(torch.equal(weights[name], own[name]) for name in own)
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: someone/a-model\n")
    assert "| loreft | 0 | block_output | l1 | 2 |\n\n130 parameters are trained, " in card
    assert "PEFT" not in card


@pytest.mark.parametrize(
    ("kind", "model_type", "line"),
    [
        ("AutoModelForCausalLM", "llama", "AutoModelForCausalLM.from_pretrained("),
        (
            "AutoModelForSequenceClassification",
            "bert",
            "AutoModelForSequenceClassification.from_pretrained(",
        ),
        ("AutoModelForSeq2SeqLM", "t5", "T5ForConditionalGeneration.from_pretrained("),
        ("AutoModelForCausalLM", "gpt2", "GPT2LMHeadModel.from_pretrained("),
    ],
)
def test_the_card_loads_the_base(kind: str, model_type: str, line: str, tmp_path: Path) -> None:
    base = tiny(model_type, getattr(transformers, kind))
    base.config.name_or_path = str(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    reft_model = train_randomly(wrapped(LOREFT, base))
    reft_model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f'model = {line}"base"' in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"base"', repr(str(tmp_path / "base")))
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "adapter")), names)
    loaded = names["reft_model"].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in reft_model.state_dict().items())


def tiny(model_type: str, auto: Any) -> Any:
    sizes = {"t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4} if model_type != "gpt2" else {}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    values = sizes.get(model_type, gpt2 if model_type == "gpt2" else small)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=50, num_labels=3, **values)
    return auto.from_config(config)


def train_randomly(reft_model: rn.ReftModel) -> rn.ReftModel:
    with torch.no_grad():
        for parameter in reft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return reft_model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_the_card_tells_of_peft_and_of_the_embedded_base(tmp_path: Path) -> None:
    base, _ = rn.load_tiny_model()
    lora = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}
    rn.get_reft_model(base, rn.ReftConfig([LOREFT], peft=lora)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "model, tokenizer = rn.load_tiny_model()\n" in card
    assert "AutoModel" not in card
    assert "a method of PEFT (lora): `pip install 'reftnoise[peft]'`" in card
    assert "2,562 parameters are trained" in card  # 2·2·128 + 2, and 4 layers of 2·(128 + 128)


# -- another base of the same shape ----------------------------------------------------------------


def with_other_weights() -> Any:
    other = tiny_model()
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(1.05)
    return other


def test_other_weights_of_the_same_shape_are_noticed(adapter: Path) -> None:
    path = adapter / "reft_config.json"
    other = with_other_weights()
    other.config.name_or_path = ""
    message = (
        f"{path}: the adapter's base (someone/a-model) and the given model (which has no name) "
        "have different weights, as in model.layers.0.self_attn.q_proj.weight"
    )
    with pytest.warns(UserWarning, match=exactly(message)):
        rn.ReftModel.from_pretrained(other, adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_base_is_the_same_base(dtype: torch.dtype, adapter: Path, tmp_path: Path) -> None:
    rn.ReftModel.from_pretrained(tiny_model().to(dtype), adapter)
    wrapped(LOREFT, tiny_model().to(dtype)).save_pretrained(tmp_path / "cast")
    rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "cast")
    rn.ReftModel.from_pretrained(tiny_model().to(torch.bfloat16).half(), tmp_path / "cast")


def test_a_resized_vocabulary_is_the_same_base(adapter: Path) -> None:
    resized = tiny_model()
    resized.resize_token_embeddings(resized.config.vocab_size + 7, mean_resizing=False)
    rn.ReftModel.from_pretrained(resized, adapter)


def test_an_adapter_without_a_sample_is_loaded(adapter: Path) -> None:
    path = adapter / "reft_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    del description["base_model"]["sample"]
    path.write_text(json.dumps(description), encoding="utf-8")
    rn.ReftModel.from_pretrained(with_other_weights(), adapter)


def test_weights_that_are_not_here_tell_nothing(adapter: Path) -> None:
    sample = json.loads((adapter / "reft_config.json").read_text(encoding="utf-8"))["base_model"][
        "sample"
    ]
    assert other_weights(sample, with_other_weights()) is not None
    assert other_weights(sample, with_other_weights().to("meta")) is None
    quantised = with_other_weights().requires_grad_(False)
    for part in quantised.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.to(torch.int8), requires_grad=False)
    assert other_weights(sample, quantised) is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_weights_that_peft_changes_are_not_compared() -> None:
    lora = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    config = rn.ReftConfig([LOREFT], peft=lora)
    reft_model = rn.get_reft_model(tiny_model(), config)
    sample = sample_weights(reft_model.model, ())
    assert sample
    assert not any("q_proj" in name for name in sample)
    assert other_weights(sample, tiny_model()) is None


def test_trained_weights_of_the_base_are_not_compared(tmp_path: Path) -> None:
    config = rn.ReftConfig([LOREFT], modules_to_save=["q_proj"])
    train_randomly(rn.get_reft_model(tiny_model(), config)).save_pretrained(tmp_path)
    rn.ReftModel.from_pretrained(tiny_model(), tmp_path)


def test_an_unknown_key_names_the_nearest(adapter: Path) -> None:
    path = adapter / "reft_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(description | {"module_to_save": ["lm_head"]}), encoding="utf-8")
    start = f"{path}: unknown key 'module_to_save'; did you mean 'modules_to_save'? possible: "
    with pytest.raises(ValueError, match=f"^{re.escape(start)}"):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    wrapped(LOREFT).save_pretrained(tmp_path / "adapter")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "usual").stat().st_mode)}


def test_saving_over_an_adapter_replaces_it_alone(tmp_path: Path) -> None:
    train(wrapped(LOREFT)).save_pretrained(tmp_path)
    others = {"README.md": b"# My card", "notes.txt": b"mine", "model.safetensors": b"of another"}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    second = train(
        wrapped(
            {"layer": "all", "intervention": "noreft", "low_rank_dimension": 3, "act_fn": "gelu"}
        )
    )
    second.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == FILES | set(others)
    assert others.items() <= contents(tmp_path).items()
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(second))


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    wrapped(LOREFT).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_a_state_that_was_gathered_elsewhere_is_written(tmp_path: Path) -> None:
    reft_model, other = wrapped(LOREFT), train(wrapped(LOREFT))
    reft_model.save_pretrained(tmp_path, state_dict=other.state_dict())
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(other))


@pytest.mark.parametrize(
    "options",
    [
        {"save_function": torch.save},
        {"safe_serialization": True},
        {"safe_serialization": False},
        {"max_shard_size": "5GB", "variant": None, "token": None},
        {"selected_adapters": ["default"], "save_embedding_layers": "auto"},
        {"push_to_hub": False, "commit_message": "one"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_transformers_and_peft(options: dict[str, Any], tmp_path: Path) -> None:
    reft_model = train(wrapped(LOREFT))
    reft_model.save_pretrained(tmp_path, is_main_process=True, **options)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "fp16"}, ValueError, "variant 'fp16': expected None"),
        ({"selected_adapters": ["x"]}, ValueError, "selected_adapters ['x']: expected None or"),
        (
            {"save_functio": 1},
            TypeError,
            "no argument 'save_functio'; did you mean 'save_func",
        ),
        ({"state_dict": False}, ValueError, "state_dict False: expected tensors by name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_ask_for_another_form(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        wrapped(LOREFT).save_pretrained(tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_a_save_may_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(rn.ReftModel, "push_to_hub", lambda _, **options: calls.append(options))
    reft_model = wrapped(LOREFT)
    reft_model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="secret")
    reft_model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert calls == [{"repo_id": "mine", "token": "secret"}, {"repo_id": "me/other"}]


# -- a save that fails ---------------------------------------------------------------------------


def test_saving_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=exactly(f"{path}: expected a directory, found a file")):
        wrapped(LOREFT).save_pretrained(path)
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("file", ["reft_model.safetensors", "reft_config.json"])
def test_a_write_that_fails_leaves_what_was_there(
    file: str, is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = train(wrapped(LOREFT))
    if not is_first:
        old.save_pretrained(tmp_path)
    before = contents(tmp_path)
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        if path.name != file:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError("No space left on device")

    other = train(wrapped(LOREFT | {"positions": "all"}))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_model_that_was_cast_is_saved_as_it_is(tmp_path: Path) -> None:
    reft_model = train(wrapped(LOREFT, tiny_model())).to(torch.bfloat16)
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))


def test_a_ready_module_of_another_width_is_loaded(tmp_path: Path) -> None:
    module = rn.LoreftIntervention(embed_dim=64, low_rank_dimension=2)
    entry = {"component": "model.layers[1].mlp.act_fn.output", "intervention": module}
    reft_model = train(wrapped(entry))
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))


def test_paths_of_a_machine_are_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model()
    base.config.name_or_path = str(tmp_path)
    reft_model = wrapped(LOREFT, base)
    reft_model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "reft_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model"]["path"] == str(tmp_path)
    pushed = tmp_path / "pushed"
    hub = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        upload_folder=lambda *, folder_path, **_: shutil.copytree(folder_path, pushed),
    )
    monkeypatch.setattr("reftnoise.adapters.mixin.HfApi", lambda **_: hub)
    reft_model.push_to_hub("adapter")
    for path in (tmp_path / "adapter" / "README.md", *pushed.iterdir()):
        content = path.read_bytes()
        assert tmp_path.name.encode() in content
        assert str(tmp_path).encode() not in content


def test_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's calls, answered by a stand-in."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def __init__(self, token: Any) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: str, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls.append(("upload", options))
            return "address"

    monkeypatch.setattr("reftnoise.adapters.mixin.HfApi", Hub)
    reft_model = train(wrapped(LOREFT))
    assert reft_model.push_to_hub("adapter", private=True, token="secret") == "address"
    assert calls[0] == ("adapter", {"private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "me/adapter"
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "uploaded")
    assert torch.equal(logits(loaded), logits(reft_model))


class Shift(rn.ReftIntervention):
    """A user's intervention: one vector, added everywhere."""

    def __init__(self, *, embed_dim: int, low_rank_dimension: int = 1, scale: float = 1.0) -> None:
        super().__init__(embed_dim=embed_dim, low_rank_dimension=low_rank_dimension)
        self.scale = scale
        self.offset = nn.Parameter(torch.ones(embed_dim))

    def edit(self, hidden: Tensor) -> Tensor:
        return (self.scale * self.offset).to(hidden).expand_as(hidden)


class CountingShift(Shift):
    """One with a buffer."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__(embed_dim=embed_dim)
        self.register_buffer("count", torch.tensor(7))


def test_a_users_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTERVENTIONS, "shift", Shift)
    reft_model = train(wrapped({"layer": 0, "intervention": "shift", "scale": 0.5}))
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))

    monkeypatch.delitem(INTERVENTIONS, "shift")
    known = ", ".join(INTERVENTIONS)
    place = f"{tmp_path / 'reft_config.json'}: representations[0]"
    message = f"{place}: intervention 'shift' is not registered; known: {known}; "
    message += "register_intervention('shift') adds a class of your own"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_users_class_with_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTERVENTIONS, "counting", CountingShift)
    wrapped({"layer": 0, "intervention": "counting"}).save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert [buffer.item() for _, buffer in loaded.interventions.named_buffers()][-1] == 7


def test_an_unregistered_class_is_not_saved(tmp_path: Path) -> None:
    reft_model = wrapped({"layer": 0, "intervention": Shift(embed_dim=32)})
    message = (
        "Shift is not registered, so no configuration can name it: decorate the class with "
        '@register_intervention("some_name")'
    )
    with pytest.raises(ValueError, match=exactly(message)):
        reft_model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- a load that fails ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    base = tiny_model()
    base.config.name_or_path = "someone/a-model"
    wrapped(LOREFT, base).save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A saved adapter to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("base", "difference"),
    [
        (lambda: tiny_model("gpt2"), ("model_type", "'llama'", "'gpt2'")),
        (lambda: tiny_model(hidden_size=64), ("hidden_size", "32", "64")),
        (lambda: tiny_model(num_hidden_layers=2), ("num_hidden_layers", "3", "2")),
    ],
    ids=["architecture", "width", "layers"],
)
def test_another_base(
    base: Callable[[], Any], difference: tuple[str, str, str], adapter: Path
) -> None:
    model = base()
    model.config.name_or_path = "someone/another"
    field, theirs, mine = difference
    message = (
        f"{adapter / 'reft_config.json'}: the adapter's base (someone/a-model) has {field} "
        f"{theirs}, the given model (someone/another) {mine}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftModel.from_pretrained(model, adapter)


KEY = "interventions.layer_{}_comp_block_output_unit_pos_nunit_1#0"


@pytest.mark.parametrize(
    ("changes", "file", "problem"),
    [
        (
            {"schema_version": 2},
            "reft_config.json",
            "schema version 2, but this reftnoise reads version 1",
        ),
        (
            {"representations": [LOREFT, LOREFT | {"layer": 2}]},
            "reft_model.safetensors",
            f"the config names {KEY.format(2)}.rotate_layer.weight, the file does not hold it",
        ),
        (
            {"representations": [LOREFT | {"intervention": "lobireft"}]},
            "reft_model.safetensors",
            f"the config names {KEY.format(0)}.learned_source, the file does not hold it",
        ),
        (
            {"representations": [{"intervention": "neftune"}]},
            "reft_model.safetensors",
            f"holds {KEY.format(0)}.learned_source.bias, which neither the config nor the base has",
        ),
        (
            {"representations": [LOREFT | {"low_rank_dimension": 5}]},
            "reft_model.safetensors",
            f"{KEY.format(0)}.learned_source.bias has shape (2,), the config says (5,)",
        ),
    ],
    ids=["schema", "one unit more", "another unit", "one unit less", "shape"],
)
def test_a_config_of_another_adapter(
    changes: dict[str, Any], file: str, problem: str, adapter: Path
) -> None:
    path = adapter / "reft_config.json"
    description = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ValueError, match=exactly(f"{adapter / file}: {problem}")):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"schema_vers',
        "[1, 2]",
        "3",
        '{"base_model": {}, "representations": []}',
        '{"schema_version": 1, "representations": []}',
        '{"schema_version": 1, "base_model": {}}',
        pytest.param('{"schema_version": 1, "base_model": "x", "representations": []}'),
        pytest.param('{"schema_version": 1, "base_model": null, "representations": []}'),
        pytest.param('{"schema_version": 1, "base_model": {}, "representations": {"a": 1}}'),
    ],
)
def test_a_damaged_config(text: str, adapter: Path) -> None:
    path = adapter / "reft_config.json"
    path.write_text(text, encoding="utf-8")
    start = f"^{re.escape(f'{path}: damaged or not an adapter')}'s config \\("
    with pytest.raises(ValueError, match=start):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize(
    "size", [0, 4, 100, -1], ids=["empty", "in its length", "in its header", "at its end"]
)
def test_truncated_weights(size: int, adapter: Path) -> None:
    path = adapter / "reft_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: truncated or damaged \(.+\)$"):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("reft_config.json", "no reft_config.json in it, so it is not an adapter directory"),
        ("reft_model.safetensors", "no reft_model.safetensors in it"),
    ],
)
def test_a_missing_file(name: str, problem: str, adapter: Path) -> None:
    (adapter / name).unlink()
    with pytest.raises(FileNotFoundError, match=exactly(f"{adapter}: {problem}")):
        rn.ReftModel.from_pretrained(tiny_model(), adapter)


@pytest.mark.parametrize("kind", [Path, str])
def test_a_directory_that_does_not_exist(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=exactly(f"{path}: no such directory")):
        rn.ReftModel.from_pretrained(tiny_model(), kind(path))


def test_a_repository_that_is_not_to_be_had() -> None:
    start = "^someone/nothing: no such directory here, and none on the hub"
    with pytest.raises(FileNotFoundError, match=start):
        rn.ReftModel.from_pretrained(tiny_model(), "someone/nothing")


def test_a_file_instead_of_a_directory(adapter: Path) -> None:
    path = adapter / "reft_model.safetensors"
    with pytest.raises(ValueError, match=exactly(f"{path}: expected a directory, found a file")):
        rn.ReftModel.from_pretrained(tiny_model(), path)


# -- what is trained of the base -----------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_trained_parts_of_the_base_are_restored(tie: bool, tmp_path: Path) -> None:
    base = tiny_model(tie_word_embeddings=tie)
    reft_model = wrapped(LOREFT, base)
    base.lm_head.requires_grad_(True)
    train(reft_model).save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "reft_model.safetensors")
    of_base = [name for name in weights if not name.startswith("interventions.")]
    assert of_base == ["model.model.embed_tokens.weight" if tie else "model.lm_head.weight"]

    fresh = tiny_model(tie_word_embeddings=tie)
    assert not torch.equal(fresh.lm_head.weight, base.lm_head.weight)
    loaded = rn.ReftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(fresh.lm_head.weight, base.lm_head.weight)
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is tie
    assert torch.equal(logits(loaded), logits(reft_model))


def test_a_frozen_base_with_tied_weights(tmp_path: Path) -> None:
    reft_model = train(wrapped(LOREFT, tiny_model(tie_word_embeddings=True)))
    reft_model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "reft_model.safetensors")
    assert all(name.startswith("interventions.") for name in weights)
    loaded = rn.ReftModel.from_pretrained(tiny_model(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(loaded), logits(reft_model))


def test_trained_parts_of_the_base_survive_a_second_save(tmp_path: Path) -> None:
    reft_model = wrapped(LOREFT)
    reft_model.model.lm_head.requires_grad_(True)
    train(reft_model).save_pretrained(tmp_path / "first")
    rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "first").save_pretrained(
        tmp_path / "second"
    )
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "second")
    assert torch.equal(logits(loaded), logits(reft_model))


def test_a_failed_load_leaves_the_bases_weights_alone(tmp_path: Path) -> None:
    reft_model = wrapped(LOREFT)
    reft_model.model.lm_head.requires_grad_(True)
    train(reft_model).save_pretrained(tmp_path)
    path = tmp_path / "reft_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    base = tiny_model()
    with pytest.raises(ValueError, match="truncated or damaged"):
        rn.ReftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), logits(tiny_model()))


# -- state and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("is_head_trained", [False, True])
def test_the_state_holds_adapters_only(tie: bool, is_head_trained: bool) -> None:
    trained, fresh = (wrapped(LOREFT, tiny_model(tie_word_embeddings=tie)) for _ in range(2))
    for reft_model in (trained, fresh):
        reft_model.model.lm_head.requires_grad_(is_head_trained)
    train(trained)
    parameters = ("rotate_layer.weight", "learned_source.weight", "learned_source.bias")
    expected = {f"{KEY.format(0)}.{name}" for name in parameters}
    if is_head_trained:
        expected |= {"model.model.embed_tokens.weight" if tie else "model.lm_head.weight"}
    state = trained.state_dict()
    assert set(state) == expected
    result = fresh.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(logits(fresh), logits(trained))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_strict_load_of_another_state(change: str) -> None:
    reft_model = wrapped(LOREFT)
    state = reft_model.state_dict()
    name = f"{KEY.format(0)}.learned_source.bias"
    state[f"{name}2"] = state[name]
    if change == "missing":
        del state[name], state[f"{name}2"]
    with pytest.raises(RuntimeError, match=f"(?i){change} key.*{re.escape(name)}"):
        reft_model.load_state_dict(state, strict=True)


def test_a_copy_is_independent() -> None:
    reft_model = train(wrapped([LOREFT, {"intervention": "neftune"}]))
    before, loss = logits(reft_model), training_loss(reft_model)
    twin = copy.deepcopy(reft_model)
    assert torch.equal(logits(twin), before)
    assert torch.equal(training_loss(twin), loss)

    with torch.no_grad():
        for parameter in twin.interventions.parameters():
            parameter.add_(1)
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(reft_model), before)

    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.zero_()
    assert not logits(twin).any()
    assert torch.equal(logits(reft_model), before)


def test_the_file_has_every_section_of_a_config() -> None:
    assert tuple(field.name for field in fields(rn.ReftConfig)) == SECTIONS
