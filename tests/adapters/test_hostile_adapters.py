"""What a damaged or hostile adapter directory ends in: one line, soon, and nothing from outside."""

import ast
import hashlib
import importlib
import json
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import reftnoise as rn
from reftnoise.adapters.directory import AdapterFiles
from reftnoise.engine.base import saved_peft
from reftnoise.engine.base.loading import load_base
from reftnoise.engine.base.tiny import DIRECTORY
from support.hostile_adapters import CONFIG, DAMAGES, WEIGHTS
from support.models.architectures import tiny_model

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"}
INSIDE = {"component": "model.layers[1].mlp.act_fn.output", "intervention": "bias", "embed_dim": 64}
NOISE = {"intervention": "neftune", "alpha": 5.0}
LORA = {"peft_type": "lora", "r": 2, "target_modules": r".*\.(q|v)_proj"}
LORA |= {"rank_pattern": {r"layers\.[01]\..*": 3}, "init_lora_weights": False}
SECONDS, BYTES = 2.0, 500 * 2**20
FAILED_ONCE = (2322, 2622, 19990)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
]

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of several kinds, one of them as the first release wrote it."""
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    directory = tmp_path_factory.mktemp("adapters") / "sound"
    torch.manual_seed(0)
    configs = {
        "units": rn.ReftConfig([LOREFT, INSIDE, NOISE]),
        "first": rn.ReftConfig([LOREFT, NOISE]),
        "norm": rn.ReftConfig([LOREFT], modules_to_save=["model.norm"]),
        "lora": rn.ReftConfig([LOREFT], peft=LORA),
    }
    for name, config in configs.items():
        rn.get_reft_model(tiny_model(), config).save_pretrained(directory / name)
    plain = safetensors.torch.save(safetensors.torch.load_file(directory / "first" / WEIGHTS))
    (directory / "first" / WEIGHTS).write_bytes(plain)
    change(directory / "first", weights_sha256=hashlib.sha256(plain).hexdigest())
    return directory


def change(directory: Path, **sections: Any) -> None:
    """Replace sections of a config."""
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))


class Hung(BaseException):
    """No load catches it."""


def _hung(*_: object) -> None:
    raise Hung


def outcome(base: Any, directory: Path) -> str:
    """`loads`, or the name of the error; an AssertionError for all that must not be."""
    start, end, message = time.monotonic(), "loads", ""
    try:
        reft_model = rn.ReftModel.from_pretrained(base, directory)
    except (ValueError, OSError) as error:
        end, message = type(error).__name__, str(error)
    finally:
        assert time.monotonic() - start < SECONDS * 10  # of a machine that may be busy
    assert "\n" not in message
    assert len(message) < 2_000
    if message:
        return end
    held = AdapterFiles.read(directory)
    assert reft_model.reft_config == held.config
    state = reft_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in held.weights().items())
    with torch.no_grad():
        reft_model(IDS)
        reft_model.train()(IDS, labels=IDS)
    return end


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seeds",
    [[*range(150), *FAILED_ONCE], pytest.param(range(20_000), marks=pytest.mark.slow)],
    ids=len,
)
def test_damaged_adapters(seeds: Sequence[int], sound: Path) -> None:
    kinds, base, ends = sorted(sound.iterdir()), tiny_model(), Counter[str]()
    peak, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    signal.signal(signal.SIGALRM, _hung)
    wrong: list[str] = []
    for seed in seeds:
        chance = random.Random(seed)
        directory = sound.parent / "damaged" / "adapter"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(chance.choice(kinds), directory)
        damage = chance.choice(DAMAGES)
        damage(chance, directory)
        signal.alarm(60)
        start = time.monotonic()
        try:
            end = outcome(base, directory)
        except (Exception, Hung) as error:
            end = "wrong"
            wrong.append(f"{seed} {damage.__name__}: {type(error).__name__} {str(error)[:200]}")
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        ends[f"{damage.__name__}: {end}"] += 1
        if hasattr(base, "peft_config") or end in ("loads", "wrong"):
            if end not in ("loads", "wrong"):
                wrong.append(f"{seed} {damage.__name__}: the base is not what it was")
            base = tiny_model()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    print(f"{sorted(ends.items())}\nslowest {slowest:.2f} s, {grown / 2**20:.0f} MiB more")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(seeds)}", *wrong[:40]])
    assert grown < BYTES


# -- nothing from outside -------------------------------------------------------------------------


_SLOW = r"((a|.)+)+$x"
"""For minutes, where `re` matches it against a module's name."""

PROMPT = {"peft_type": "prompt_tuning", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("sound_section", "hostile"),
    [
        (
            PROMPT,
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "x",
                "tokenizer_name_or_path": "evil/repository",
                "tokenizer_kwargs": {"trust_remote_code": True},
            },
        ),
        (
            PROMPT | {"peft_type": "multitask_prompt_tuning", "num_tasks": 2},
            {
                "prompt_tuning_init": "EXACT_SOURCE_TASK",
                "prompt_tuning_init_state_dict_path": "/evil/weights.bin",
            },
        ),
        (
            {"peft_type": "lora", "target_modules": ["q_proj"]},
            {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
        ),
    ],
    ids=["tokenizer", "pickle", "module"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_section_that_names_other_places(
    sound_section: dict[str, Any],
    hostile: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file has all values, so loading needs none of them; and they are saved again."""
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    saved = rn.get_reft_model(tiny_model(), rn.ReftConfig([LOREFT], peft=sound_section)).eval()
    saved.save_pretrained(tmp_path)
    section = json.loads((tmp_path / CONFIG).read_text())["peft"]
    change(tmp_path, peft=section | hostile)

    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("loading looks elsewhere")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fetched)
    monkeypatch.setattr("torch.load", fetched)
    imported = importlib.import_module

    def found(name: str, *rest: Any) -> Any:
        return fetched() if name == "evil_module" else imported(name, *rest)

    monkeypatch.setattr("importlib.import_module", found)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    monkeypatch.undo()
    with torch.no_grad():
        task = {"task_ids": torch.zeros(2).long()} if "num_tasks" in sound_section else {}
        assert torch.equal(loaded(IDS, **task).logits, saved(IDS, **task).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG).read_text())["peft"]
    assert hostile.items() <= again.items()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"target_modules": _SLOW}, f"peft target_modules {_SLOW!r}: the base has no such module"),
        ({"rank_pattern": {_SLOW: 3}}, "has shape (3, 32), the config says (2, 32)"),
        ({"modules_to_save": ["(a+)+"]}, "peft modules_to_save '(a+)+': expected the name of a"),
        ({"r": 10**6}, "peft r 1000000: expected at most "),
        ({"layer_replication": [[0, 3]] * 9}, "peft layer_replication "),
        ({"init_lora_weights": "pissa_niter_99999999"}, "peft init_lora_weights 'pissa_niter_9999"),
        ({"target_modules": ["q_proj"]}, "which neither the config nor the base has"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, ", the file does not hold it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_section_that_costs_more_than_its_file(
    section: dict[str, Any], message: str, sound: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(sound / "lora", tmp_path / "adapter"))
    change(directory, peft=json.loads((directory / CONFIG).read_text())["peft"] | section)
    base = tiny_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        rn.ReftModel.from_pretrained(base, directory)
    assert not hasattr(base, "peft_config")
    assert not any("lora" in name for name, _ in base.named_modules())


def test_patterns_have_an_end(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_peft, "_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"peft target_modules '.*': takes too long to match$"):
        rn.ReftModel.from_pretrained(tiny_model(), sound / "lora")


def test_patterns_are_saved_as_they_were(sound: Path, tmp_path: Path) -> None:
    loaded = rn.ReftModel.from_pretrained(tiny_model(), sound / "lora")
    assert loaded.reft_config.peft is not None
    assert loaded.reft_config.peft["target_modules"] == LORA["target_modules"]
    loaded.save_pretrained(tmp_path)
    again = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    ranks = {n: len(p) for n, p in loaded.model.named_parameters() if "lora_A" in n}
    assert [rank for name, rank in ranks.items() if "q_proj" in name] == [3, 3, 2]


def test_units_that_cost_more_than_their_file(sound: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sound / "units", tmp_path / "adapter"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for entry in (INSIDE | {"embed_dim": 10**9}, LOREFT | {"layer": "0-60000000"}):
        change(directory, representations=[LOREFT, entry, NOISE])
        with pytest.raises(ValueError, match=r"has shape \(64,\)|the model has layers 0 to 2"):
            rn.ReftModel.from_pretrained(tiny_model(), directory)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig([LOREFT])).eval()
    key, unit = next(iter(reft_model.interventions.items()))
    unit.learned_source.bias.data[0] = torch.nan
    name = f"interventions.{key}.learned_source.bias"
    with pytest.warns(UserWarning, match=re.escape("1 of 9 tensors that are saved hold numbers")):
        reft_model.save_pretrained(tmp_path)
    message = f"{tmp_path / WEIGHTS}: {name} holds numbers that are not finite"
    with pytest.raises(ValueError, match=re.escape(message)):
        rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path, allow_nan=True)
    assert loaded.interventions[key].learned_source.bias[0].isnan()


def test_dependent_rows_of_r_are_named(tmp_path: Path) -> None:
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig([LOREFT])).eval()
    key, unit = next(iter(reft_model.interventions.items()))
    unit.rotate_layer.weight.data.zero_()
    with pytest.warns(UserWarning, match=r"dependent rows of R.*rotate_layer\.weight"):
        reft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{key}\.rotate_layer\.weight holds .* dependent rows"):
        rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    rn.ReftModel.from_pretrained(tiny_model(), tmp_path, allow_nan=True)


@pytest.mark.parametrize(
    "name",
    ["x/y\nlibrary_name: evil", 'a"); import os; os.system("x', "a```\n# b", "a|b/c", "x" * 999],
)
def test_a_bases_name_stays_a_name_in_the_card(name: str, tmp_path: Path) -> None:
    base = tiny_model()
    base.config.name_or_path = name
    rn.get_reft_model(base, rn.ReftConfig([LOREFT])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    head = card.split("---\n")[1]
    assert head == "library_name: reftnoise\ntags:\n- reft\n"
    code = ast.parse(card.split("```python\n")[1].split("\n```")[0])
    assert len(code.body) == 4
    assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert sum(line.startswith("```") for line in card.splitlines()) == 2


def test_code_that_comes_with_a_base_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code.Evil"}}
    shutil.copytree(DIRECTORY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="comes with code of its own, which is not run"):
        load_base(str(tmp_path))
