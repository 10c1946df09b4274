"""README's code runs as it stands."""

import re
from pathlib import Path

import pytest
import yaml
from architectures import tiny_model
from transformers import AutoTokenizer

import reftnoise as rn
from reftnoise._util.options import read
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.interventions import INTERVENTIONS
from reftnoise.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    section = README[README.index(f"\n## {heading}") :]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_twenty_line_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("Twenty lines")
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 20
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert "🐻" in capsys.readouterr().out
    loaded = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], "emoji-adapter")
    assert loaded.count_parameters() == names["reft_model"].count_parameters()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*early_stopping.*:UserWarning")
def test_pyrefts_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("The original emoji example")
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    tokenizer.unk_token = "<|pad|>"
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(num_hidden_layers=16, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    here = {'"meta-llama/Llama-2-7b-chat-hf"': repr(str(tmp_path / "base")), '"cuda"': '"cpu"'}
    smaller = {
        "num_train_epochs=100.0": "num_train_epochs=2.0",
        "max_new_tokens=512": "max_length=40",
    }
    for given, replacement in (here | smaller).items():
        assert given in code
        code = code.replace(given, replacement)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "reft_to_share" / "reft_model.safetensors").is_file()


def test_an_intervention_of_your_own() -> None:
    code = block("An intervention of your own")
    assert len([line for line in code.splitlines() if line]) <= 15
    try:
        exec(code, {})
        entry = {"layer": "all", "intervention": "rescale", "low_rank_dimension": 2, "dropout": 0.1}
        config = rn.ReftConfig(representations=entry)
        assert rn.ReftConfig.from_yaml(config.to_yaml()).to_dict() == config.to_dict()
        model = rn.get_reft_model(rn.load_tiny_model()[0], config)
        assert len(model.interventions) == model.config.num_hidden_layers
    finally:
        INTERVENTIONS.pop("rescale", None)


def test_every_unit_is_in_the_table() -> None:
    assert all(f"| `{name}` |" in README for name in INTERVENTIONS)


@pytest.mark.parametrize("heading", ["Tasks", "Reports"])
def test_evaluation_and_inspection(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(heading), {})
    assert capsys.readouterr().out


def test_the_recipe_is_one() -> None:
    found = re.search(
        r"```yaml\n(.*?)```", README[README.index("## From the command line") :], re.S
    )
    assert found is not None
    recipe = read(Recipe, yaml.safe_load(found[1].replace("4.0e-3", "0.004")))
    assert [unit["intervention"] for unit in recipe.representations] == ["loreft", "symnoise"]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
