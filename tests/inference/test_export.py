"""Exports against the adapted model, exact or refused, on tiny models of five architectures."""

import gc
import json
import shlex
import warnings
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import reftnoise as rn
from reftnoise._util.files import replace_all
from reftnoise.config.interventions import argument_defaults
from reftnoise.inference.export import exporting
from reftnoise.inference.export.proof import GreedyAnswers, limit_of_rounding
from reftnoise.interventions import INTERVENTIONS, NoiseIntervention
from support.adapters import moved
from support.command_line import command
from support.models.architectures import tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft

PROMPTS = ["Where does a bear live?"]
LOREFT = {"intervention": "loreft", "low_rank_dimension": 2, "positions": "all+decode"}
UNITS: dict[str, dict[str, Any]] = {
    "loreft": LOREFT,
    "ablate": {"intervention": "ablate"},
    "bias": {"intervention": "bias"},
    "red": {"intervention": "red"},
}
"""Linear with a constant, linear without, constant, and diagonal with a constant."""
COMPONENTS = (
    *("block_output", "block_input", "attention_output", "mlp_output", "embeddings"),
    *("attention_input", "query_output", "key_output", "value_output", "attention_value_output"),
    *("mlp_input", "mlp_activation", "attention_parallel", "mlp_parallel", "head_output"),
)
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2", "phi3")
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a tiny model of an architecture, with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def base(architecture: str, dtype: torch.dtype = torch.float32) -> str:
        _, tokenizer = rn.load_tiny_model()
        directory = root / f"{architecture}-{dtype}"
        model = tiny_model(architecture, vocab_size=len(tokenizer)).to(dtype)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return base


def adapter(
    base: str, path: Path, entries: Any, *, std: float = 0.5, **sections: Any
) -> rn.ReftModel:
    """A model with units far from the identity, which are saved."""
    model, _ = rn.load_base(base)
    torch.manual_seed(1)
    reft_model = rn.get_reft_model(model, rn.ReftConfig(entries, **sections)).eval()
    moved(reft_model, std)
    for name, buffer in reft_model.interventions.named_buffers():
        if name.endswith(("vector", "largest")):
            buffer.normal_(std=std)
    reft_model.save_pretrained(path / "adapter")
    return reft_model


def entry(unit: str, component: str, layer: int | None = 1) -> dict[str, Any]:
    place: dict[str, Any] = {}
    if component != "embeddings" and layer is not None:
        place["layer"] = layer
    if component == "head_output":
        place["heads"] = [0, 2]
    return UNITS[unit] | {"component": component, **place}


def export(path: Path, base: str, to: str, **options: Any) -> dict[str, Any]:
    options = {"model": base, "prompts": PROMPTS} | options
    return rn.export_adapter(path / "adapter", path / "export", to, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=TOKENS).logits
    return values


def expect_equal(reft_model: rn.ReftModel, exported: Any, effect: float = 1e-2) -> None:
    """Logits equal to 1e-5 of the largest, and the greedy tokens, of edits that have an effect."""
    expected = logits(reft_model)
    with torch.no_grad(), reft_model.disabled():
        moved_by = (logits(reft_model) - expected).abs().max()
    assert moved_by >= effect
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=tolerance)
    written = [m.generate(input_ids=TOKENS, max_new_tokens=6) for m in (reft_model, exported)]
    assert torch.equal(*written)


def expect_merged(
    reft_model: rn.ReftModel, path: Path, base: str, effect: float = 1e-2
) -> dict[str, Any]:
    record = export(path, base, "merged")
    merged = AutoModelForCausalLM.from_pretrained(path / "export").eval()
    expect_equal(reft_model, merged, effect)
    return record


def reason(architecture: str, component: str, unit: str) -> str:
    """Why an edit is not exact in a merged checkpoint, by what is known of the architecture."""
    is_constant, is_parallel = unit == "bias", component.endswith("_parallel")
    is_block = component.startswith("block_")
    place = component.replace("_parallel", "_output")
    of_qkv = place in ("query_output", "key_output", "value_output", "attention_input")
    has_bias = {
        "llama": True,  # by the flags attention_bias and mlp_bias
        "gpt2": True,
        "gemma2": not (is_block or place.startswith("mlp")),  # by the flag attention_bias
        "qwen2": of_qkv,
        "phi3": False,
    }
    rules = {
        "computed of the module's input": is_parallel and not is_constant,
        "stands between": (is_block and not is_constant)
        or (is_block and architecture == "gemma2")  # which norms what its MLP returns
        # Others multiply it with what another matrix makes.
        or (place == "mlp_activation" and architecture != "gpt2"),
        "that of lm_head, too": place == "embeddings" and architecture in ("gemma2", "gpt2"),
        "has no bias": place != "embeddings" and unit != "ablate" and not has_bias[architecture],
    }
    return next((why for why, holds in rules.items() if holds), "")


GRID = [(a, c, u) for a in ARCHITECTURES for c in COMPONENTS for u in UNITS]
FEW = {
    ("llama", "mlp_output", "loreft"),
    ("llama", "block_output", "bias"),
    ("qwen2", "attention_input", "loreft"),
    ("qwen2", "mlp_output", "red"),
    ("gemma2", "block_output", "bias"),
    ("gemma2", "embeddings", "bias"),
    ("gpt2", "query_output", "loreft"),
    ("gpt2", "mlp_activation", "red"),
    ("llama", "head_output", "red"),
    ("phi3", "mlp_input", "ablate"),
}
CASES = [pytest.param(*c, marks=[] if c in FEW else pytest.mark.slow) for c in GRID]


@pytest.mark.parametrize(("architecture", "component", "unit"), CASES)
def test_merged_weights_are_exact_or_refused_with_the_reason(
    bases: Any, tmp_path: Path, architecture: str, component: str, unit: str
) -> None:
    base = bases(architecture)
    try:
        reft_model = adapter(base, tmp_path, entry(unit, component))
    except ValueError:
        assert architecture == "phi3"  # whose attention has one matrix for all three
        assert component in ("query_output", "key_output", "value_output")
        return
    expected = reason(architecture, component, unit)
    if not expected:
        # Scores of attention are small here, and a constant key changes no softmax at all.
        of_scores = component in ("query_output", "key_output")
        expect_merged(reft_model, tmp_path, base, effect=0.0 if of_scores else 1e-2)
        return
    with pytest.raises(ValueError, match=expected):
        export(tmp_path, base, "merged")
    assert not (tmp_path / "export").exists()


def test_every_unit_that_the_guide_calls_linear_is_merged(bases: Any, tmp_path: Path) -> None:
    """All of them in one adapter, each at a place of its own."""
    names = [
        name for name, unit in INTERVENTIONS.items() if not issubclass(unit, NoiseIntervention)
    ]
    whole = [name for name in names if name not in ("lofit", "jola")]
    places = product(("mlp_output", "attention_output", "value_output", "mlp_input"), range(3))
    entries: list[dict[str, Any]] = [
        {"intervention": name, "component": component, "layer": layer}
        for name, (component, layer) in zip(whole, places, strict=True)
    ]
    for entry in entries:
        known = argument_defaults(INTERVENTIONS[entry["intervention"]])
        entry |= {n: v for n, v in (("low_rank_dimension", 2), ("act_fn", None)) if n in known}
    entries += [{"intervention": "lofit", "trained": "both", "layer": 0, "heads": [1]}]
    entries += [{"intervention": "jola", "layer": 1, "heads": [0, 2]}]
    entries = [{"component": "head_output", "positions": "all+decode"} | entry for entry in entries]
    base = bases("llama")
    record = expect_merged(adapter(base, tmp_path, entries, std=0.1), tmp_path, base)
    assert len(record["edits"]) == len(names)


def test_edits_around_one_matrix_act_in_their_order(bases: Any, tmp_path: Path) -> None:
    path = "model.layers[1].mlp.down_proj"
    entries = [
        entry("bias", "block_output"),
        entry("loreft", "mlp_output"),
        entry("red", f"{path}.output", None),
        entry("loreft", f"{path}.input", None),
        entry("red", "block_input", 0) | UNITS["bias"],
        entry("loreft", "embeddings"),
        {"intervention": "neftune", "alpha": 5.0},
    ]
    reft_model = adapter(bases("llama"), tmp_path, entries)
    record = expect_merged(reft_model, tmp_path, bases("llama"))
    assert record["config_flags"] == ["mlp_bias"]
    assert set(record["edits"].values()) == {
        f"{path.replace('[1]', '.1')}.input",
        f"{path.replace('[1]', '.1')}.output",
        "model.embed_tokens.output",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "all"}, "positions 'all': weights act on every token"),
        ({"positions": "l1"}, "positions 'l1'"),
        ({"act_fn": "gelu"}, "its activation gelu"),
        ({"gate": {"type": "probe"}}, "its gate"),
    ],
    ids=str,
)
def test_what_is_no_linear_map_of_every_token_is_refused(
    bases: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapter(bases("llama"), tmp_path, entry("loreft", "mlp_output") | change)
    begin = "loreft at mlp_output, layer 1, has no exact export: "
    with pytest.raises(ValueError, match=f"^{begin}{message}") as error:
        export(tmp_path, bases("llama"), "merged")
    assert len(str(error.value)) < 180


def test_experts_are_refused(tmp_path: Path) -> None:
    _, tokenizer = rn.load_tiny_model()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for component in ("mlp_output", "mlp_input"):
        adapter(str(tmp_path / "base"), tmp_path, entry("ablate", component))
        with pytest.raises(ValueError, match="stands between"):
            export(tmp_path, str(tmp_path / "base"), "merged")


# -- LoRA ------------------------------------------------------------------------------------------


LORAS = [
    ("llama", [entry("ablate", "mlp_output"), entry("ablate", "attention_input", 0)]),
    ("llama", [entry("loreft", "mlp_output"), entry("bias", "block_output", 2)]),
    ("gpt2", [entry("loreft", "value_output"), entry("loreft", "mlp_output", 0)]),
]


@pytest.mark.parametrize(("architecture", "entries"), LORAS, ids=["plain", "bias", "Conv1D"])
def test_peft_generates_as_the_adapted_model(
    bases: Any, tmp_path: Path, architecture: str, entries: Any
) -> None:
    base = bases(architecture)
    reft_model = adapter(base, tmp_path, entries)
    record = export(tmp_path, base, "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of biases that it will not merge
        exported = PeftModel.from_pretrained(rn.load_base(base)[0], tmp_path / "export").eval()
    expect_equal(reft_model, exported)
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == record["rank"]
    has_bias = any(e["intervention"] != "ablate" for e in entries)
    assert config["lora_bias"] is has_bias
    assert any("vLLM" in note for note in record["notes"]) is has_bias


@pytest.mark.parametrize(
    ("unit", "component", "message"),
    [
        ("red", "mlp_output", "diagonal part has full rank"),
        ("loreft", "embeddings", "changes no bias of embeddings"),
        ("loreft", "block_output", "stands between"),
    ],
)
def test_what_is_no_lora_is_refused(
    bases: Any, tmp_path: Path, unit: str, component: str, message: str
) -> None:
    adapter(bases("llama"), tmp_path, entry(unit, component))
    with pytest.raises(ValueError, match=message):
        export(tmp_path, bases("llama"), "lora")


@pytest.mark.parametrize("to", ["lora", "gguf-control-vector"])
def test_noise_alone_is_no_edit(bases: Any, tmp_path: Path, to: str) -> None:
    adapter(bases("llama"), tmp_path, {"intervention": "neftune"})
    with pytest.raises(ValueError, match="the adapter edits nothing"):
        export(tmp_path, bases("llama"), to)


def test_a_missing_package_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match="needs the package gguf: pip install"):
        export(tmp_path, "no base", "gguf-control-vector")


# -- control vectors -------------------------------------------------------------------------------


def test_a_control_vector_is_read_back(bases: Any, tmp_path: Path) -> None:
    base = bases("gemma2")
    lobireft = LOREFT | {"intervention": "lobireft", "layer": 2}
    reft_model = adapter(base, tmp_path, [entry("bias", "block_output"), lobireft])
    record = export(tmp_path, base, "gguf-control-vector")
    reader = gguf.GGUFReader(tmp_path / "export" / "control-vector.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "gemma2"
    assert fields["controlvector.layer_count"] == 3
    vectors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    [bias, rotated] = reft_model.interventions.values()
    np.testing.assert_array_equal(vectors.pop("direction.1"), bias.bias.detach().numpy())
    expected = rotated.rotate_layer().T @ rotated.learned_source
    np.testing.assert_allclose(vectors.pop("direction.2"), expected.detach(), atol=1e-6)
    assert not vectors
    assert record["proof"]["equal_greedy_answers"] == 1


@pytest.mark.parametrize(
    ("unit", "component", "layer", "message"),
    [
        ("bias", "block_output", 0, "no control vector of block 0"),
        ("bias", "mlp_output", 1, "added at a block's output"),
        ("loreft", "block_output", 1, "a control vector is a constant"),
    ],
)
def test_what_is_no_control_vector_is_refused(
    bases: Any, tmp_path: Path, unit: str, component: str, layer: int, message: str
) -> None:
    adapter(bases("llama"), tmp_path, entry(unit, component, layer))
    with pytest.raises(ValueError, match=message):
        export(tmp_path, bases("llama"), "gguf-control-vector")


# -- the base's own weights, precision, files ------------------------------------------------------


@pytest.mark.parametrize("section", [{"modules_to_save": ["lm_head"]}, {"token_rows": [5, 9]}])
def test_what_was_trained_of_the_base_is_in_a_checkpoint_alone(
    bases: Any, tmp_path: Path, section: dict[str, Any]
) -> None:
    base, _ = rn.load_base(bases("llama"))
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entry("bias", "mlp_output"), **section))
    moved(reft_model.eval())
    with torch.no_grad():
        base.lm_head.weight[5] += 1.0
        base.get_input_embeddings().weight[5] -= 0.0 if "modules_to_save" in section else 1.0
    reft_model.save_pretrained(tmp_path / "adapter")
    expect_merged(reft_model, tmp_path, bases("llama"))
    with pytest.raises(ValueError, match=f"{next(iter(section))}: .* exact is --to merged"):
        export(tmp_path, bases("llama"), "lora", overwrite=True)


def test_peft_under_the_units_is_merged_into_a_base_first(bases: Any, tmp_path: Path) -> None:
    peft = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}
    reft_model = adapter(bases("llama"), tmp_path, entry("bias", "mlp_output"), peft=peft)
    with torch.no_grad():
        for name, parameter in reft_model.model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    with pytest.raises(ValueError, match=r"exports\.md"):
        export(tmp_path, bases("llama"), "merged")
    expected, merged = logits(reft_model), str(tmp_path / "merged")
    reft_model.model.merge_and_unload().save_pretrained(merged)
    rn.load_base(bases("llama"))[1].save_pretrained(merged)
    config = rn.ReftConfig(reft_model.reft_config.representations)
    units = rn.get_reft_model(AutoModelForCausalLM.from_pretrained(merged), config).eval()
    units.interventions.load_state_dict(reft_model.interventions.state_dict())
    units.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(units), expected, rtol=0, atol=1e-5)
    expect_merged(units, tmp_path, merged)


def test_half_precision_is_as_exact_as_its_rounding(bases: Any, tmp_path: Path) -> None:
    base = bases("llama", torch.bfloat16)
    adapter(base, tmp_path, entry("loreft", "mlp_output"))
    record = export(tmp_path, base, "merged", dtype="bfloat16")
    proof = record["proof"]
    assert record["dtype"] == "bfloat16"
    assert 0 < proof["largest_logit_difference"] <= proof["limit_of_rounding"] < 0.2
    assert proof["largest_effect"] / 2 >= proof["limit"] >= proof["largest_logit_difference"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_an_edit_that_half_precision_loses_is_refused(bases: Any, tmp_path: Path) -> None:
    base = bases("llama", torch.bfloat16)
    adapter(base, tmp_path, entry("bias", "mlp_output"), std=1e-4)
    with pytest.raises(ValueError, match="nothing was written; dtype float32 rounds less"):
        export(tmp_path, base, "merged", dtype="bfloat16")
    assert export(tmp_path, base, "merged", dtype="float32")["dtype"] == "float32"


def test_a_difference_leaves_the_earlier_export(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, place = bases("llama"), tmp_path / "export"
    adapter(base, tmp_path, entry("bias", "mlp_output"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Who are you?"}\n')
    options = ("--to", "merged", "--model", base, "--prompts", prompts)
    assert command("export", tmp_path / "adapter", place, *options) == 0
    prompts.unlink()
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    record = json.loads(before["export.json"])
    assert record["proof"]["equal_greedy_answers"] == record["proof"]["prompts"] == 1
    with pytest.raises(ValueError, match="holds an export already"):
        export(tmp_path, base, "merged")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "read_merged", lambda *_: rn.load_base(base)[0])  # without edits
        with pytest.raises(ValueError, match="logits of the export differ by"):
            export(tmp_path, base, "merged", overwrite=True)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    gc.collect()
    export(tmp_path, base, "lora", overwrite=True)
    assert (place / "adapter_config.json").is_file()
    assert not (place / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "export"}
    (place / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files .* such as thesis.tex"):
        export(tmp_path, base, "lora", overwrite=True)
    (place / "thesis.tex").unlink()
    (place / "export.json").write_text("[]")
    with pytest.raises(ValueError, match="holds other files"):
        export(tmp_path, base, "lora", overwrite=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_of_any_prompt_that_is_not_finite_is_no_proof(value: float) -> None:
    logits = [torch.ones(2, 3), torch.ones(2, 3)]
    wrong = [logits[0], torch.full((2, 3), value)]
    adapted, exported = (GreedyAnswers([[1], [1]], values) for values in (logits, wrong))
    bare = GreedyAnswers([[1], [1]], [values - 1 for values in logits])
    for pair in ((adapted, exported), (exported, adapted)):
        proof = exporting._proof(*pair, bare, limit_of_rounding(pair[0], None))
        with pytest.raises(ValueError, match="nothing was written"):
            exporting._expect_same("merged", proof, torch.float32)
    broken = exporting._proof(adapted, adapted, bare, limit_of_rounding(exported, None))
    with pytest.raises(ValueError, match="nothing was written"):
        exporting._expect_same("merged", broken, torch.float32)


@pytest.mark.parametrize("effect", [1e-3, 0.1])
def test_an_export_without_a_weak_edit_is_no_proof(effect: float) -> None:
    adapted = GreedyAnswers([[1]], [torch.full((2, 3), 31.0)])
    bare = GreedyAnswers([[1]], [adapted.logits[0] - effect])
    broken = exporting._proof(adapted, bare, bare, rounding=0.4)
    with pytest.raises(ValueError, match="the adapter moves them by"):
        exporting._expect_same("merged", broken, torch.float32)
    proof = exporting._proof(adapted, adapted, bare, rounding=0.4)
    exporting._expect_same("merged", proof, torch.float32)


def test_the_commands_of_the_guide_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    guide = Path(__file__).parents[2] / "examples/guides/exports.md"
    page = guide.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    capsys.readouterr()
    lines = [line for line in page.splitlines() if line.startswith("reftnoise export")]
    Path("prompts.jsonl").write_text('{"prompt": "Who are you?"}\n')
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert command(*words, "--prompts", "prompts.jsonl") == 0, capsys.readouterr().err
        printed = capsys.readouterr()
        assert "1 of 1 greedy answers are equal" in printed.out
        assert "The export is in steering-" in printed.out
        assert max(map(len, printed.out.splitlines())) <= 80
        assert not printed.err
    assert len(lines) == 3
    Path("link").symlink_to("linked", target_is_directory=True)
    Path("linked").mkdir()
    monkeypatch.chdir("linked")
    with pytest.raises(ValueError, match="working directory"):
        rn.export_adapter("../steering", ".", "merged", prompts=PROMPTS)
    monkeypatch.chdir(tmp_path)
    rn.export_adapter("steering", "link", "merged", prompts=PROMPTS)
    assert Path("link").is_symlink()
    assert (tmp_path / "linked/export.json").is_file()


def test_a_save_next_to_a_running_export_leaves_it(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    adapter(base, tmp_path, entry("bias", "mlp_output"))
    read = exporting.read_merged

    def saved_meanwhile(*arguments: Any) -> Any:
        replace_all(tmp_path, {"other.txt": b""})
        return read(*arguments)

    monkeypatch.setattr(exporting, "read_merged", saved_meanwhile)
    export(tmp_path, base, "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "export", "other.txt"}
