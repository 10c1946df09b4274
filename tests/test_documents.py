"""README and guides: their code runs as it stands, and what they name is there."""

import functools
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

import reftnoise as rn
from reftnoise._util.options import read_file
from reftnoise.cli.commands import COMMANDS
from reftnoise.cli.main import main
from reftnoise.config.interventions import argument_defaults
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.interventions import INTERVENTIONS, NoiseIntervention, has_factors
from reftnoise.training.recipe import Recipe
from reftnoise.training.resolved_run import with_default_edit
from reftnoise.training.study.grid import Study, cells
from reftnoise.training.study.space import Tuning, check_tuning
from support.models.architectures import tiny_model

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
RUN = [ROOT / "README.md", *GUIDES]
PAGES = [*RUN, ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md"]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
NEEDS = {"methods.md": "peft", "trl.md": "trl"}
"""Extras without which a page's code does not run."""
SMALLER = {"num_train_epochs=100.0": "num_train_epochs=2.0", "max_new_tokens=512": "max_length=40"}
SMALLER |= {'"max_steps": 20': '"max_steps": 2', '"cuda"': '"cpu"'}
HEADING = re.compile(r"# (?P<where>at the end of|the new file) (?P<path>\S+)\n")
OLD_NAME = re.compile(r"^\| (?:`reftnoise[\w., `]*`) \|", re.MULTILINE)
"""In CHANGELOG's table: what is no more."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    text = TEXTS[page.name]
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(2))
        if not languages or match[1] in languages:
            yield Block(match[1], match[2], line)


# -- code ----------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """For models of the hub, directories of tiny ones."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    tokenizer.unk_token = "<|pad|>"
    llama, roberta = tmp_path / "llama", tmp_path / "roberta"
    tokenizer.save_pretrained(llama)
    tiny_model(num_hidden_layers=16, vocab_size=len(tokenizer)).save_pretrained(llama)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = RobertaConfig(vocab_size=64, num_hidden_layers=2, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(roberta)
    return {
        '"meta-llama/Llama-2-7b-chat-hf"': repr(str(llama)),
        '"FacebookAI/roberta-base"': repr(str(roberta)),
    }


def harness(model: Any, tasks: list[str]) -> dict[str, Any]:
    """lm-evaluation-harness without the hub: one request."""
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, ("Can a bee fly?", " yes"), 0)
    (answer,) = model.loglikelihood([request], disable_tqdm=True)
    return {"results": {tasks[0]: answer}}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*early_stopping.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_python_runs_block_after_block(
    page: Path, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    if find_spec("lm_eval"):
        monkeypatch.setattr("lm_eval.simple_evaluate", harness)
    monkeypatch.chdir(tmp_path)
    known, names = dict(INTERVENTIONS), {}
    try:
        for block in blocks(page, "python"):
            if HEADING.match(block.code) or ("lm_eval" in block.code and not find_spec("lm_eval")):
                continue
            code = block.code
            for text, other in (SMALLER | stand_ins).items():
                code = code.replace(text, other)
            exec(compile("\n" * block.line + code, str(page), "exec"), names)
    finally:
        INTERVENTIONS.clear()
        INTERVENTIONS.update(known)
    _results(page.stem, names, tmp_path)


def _results(page: str, names: dict[str, Any], folder: Path) -> None:
    """What the code of some pages must have done, apart from running."""
    if page == "README":
        loaded = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], "emoji-adapter")
        assert loaded.parameter_counts() == names["reft_model"].parameter_counts()
        answer = names["reft_model"].generate(**names["prompt"], max_new_tokens=8)[0]
        assert "🐻" in names["tokenizer"].decode(answer)
    elif page == "pyreft":
        assert (folder / "reft_to_share" / "reft_model.safetensors").is_file()
    elif page == "internals":
        units = names["reft_model"].interventions
        assert len(units) == names["model"].config.num_hidden_layers


def test_the_twenty_lines_are_twenty() -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    assert len([s for s in block.code.splitlines() if s and "import" not in s]) <= 20


def test_recipes_for_the_repository_work_in_a_copy(tmp_path: Path) -> None:
    caches = shutil.ignore_patterns("__pycache__")
    for name in ("interventions", "reftnoise", "tests", "examples/guides"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=caches)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = [
        "tests/interventions/test_registry.py::test_the_family_is_registered",
        "tests/cli/test_mistakes_cost_no_torch.py::test_the_names_of_units_are_known",
        "tests/config/test_components.py::test_every_component_is_the_right_module",
        "tests/config/test_components.py::test_modules_within_attention_and_mlp",
    ]
    for block in blocks(ROOT / "examples" / "guides" / "internals.md", "python", "diff"):
        if block.language == "diff":
            _apply(block.code, tmp_path)
        elif heading := HEADING.match(block.code):
            path, code = tmp_path / heading["path"], block.code[heading.end() :]
            path.parent.mkdir(parents=True, exist_ok=True)
            if heading["where"] == "at the end of":
                path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")
            else:
                assert not path.exists()
                path.write_text(code, encoding="utf-8")
                tests += [heading["path"]] if path.name.startswith("test_") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48 passed" in done.stdout


def _apply(diff: str, root: Path) -> None:
    for name, changes in re.findall(r"^--- (\S+)\n((?:[ +-](?!-- ).*\n)+)", diff, re.MULTILINE):
        path, lines = root / name, changes.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] in " -")
        after = "\n".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path}: {before}"
        path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_yaml_is_a_recipe_a_study_or_a_config(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    for block in blocks(page, "yaml"):
        path.write_text(block.code, encoding="utf-8")
        if "\naxes:" in block.code:
            assert cells(read_file(Study, path))
        elif "\nspace:" in block.code:
            check_tuning(read_file(Tuning, path))
        elif "model:" in block.code:
            assert with_default_edit(read_file(Recipe, path)).representations
        else:
            assert rn.ReftConfig.from_file(path).representations


# -- command lines -------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each line, without comments and settings of the environment."""
    for block in blocks(page, "bash"):
        if "curl" in block.code:  # its texts go over lines
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words


def _checked(function: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    @functools.wraps(function)
    def called(**_: Any) -> None:
        calls.append(function.__name__)

    return called


@by_page
def test_command_lines_are_understood(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []
    for name, function in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, name, _checked(function, calls))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples/recipes/small/emoji.yaml", tmp_path / "recipe.yaml")
    for path in ("emoji/recipe.yaml", "emoji-tuning/best.yaml", "heads.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "recipe.yaml", tmp_path / path)
    monkeypatch.chdir(tmp_path)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in command_lines(page):
        assert all((ROOT / w).exists() for w in words if w.startswith(("examples/", "tests/")))
        if words[:2] == ["reftnoise", "train"] and words[2:] == ["--print_config"]:
            with pytest.raises(SystemExit, match="0"):
                main(words[1:])
        elif words[0] == "reftnoise":
            before = len(calls)
            assert main(words[1:]) == 0, f"{words}: {capsys.readouterr().err}"
            assert len(calls) == before + 1
        elif words[0] == "make":
            assert all(f"\n{target}:" in makefile for target in words[1:])
    capsys.readouterr()


# -- what pages name -----------------------------------------------------------------------------


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page.name]):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


@by_page
def test_names_are_those_of_today(page: Path) -> None:
    text = "".join(OLD_NAME.split(TEXTS[page.name]))
    created = {heading["path"] for heading in HEADING.finditer(text)}
    for name in set(re.findall(r"`((?:reftnoise|interventions|tests|examples)/[\w./-]*)`", text)):
        assert name in created or (ROOT / name).exists(), name
    for name in set(re.findall(r"`(?:rn|reftnoise)\.(\w+)[(`]", text)) - {"RescaleIntervention"}:
        assert hasattr(rn, name) or find_spec(f"reftnoise.{name}"), name
    for name in set(re.findall(r"`(reftnoise(?:\.\w+){2,})[(`]", text)):
        assert _found(name), name
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in set(re.findall(r"'\.\[([\w-]+)\]'", text)):
        assert f"\n{extra} = [" in extras, extra


def _found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return hasattr(importlib.import_module(module), attribute)


def test_the_tree_is_the_repository() -> None:
    (block,) = blocks(ROOT / "README.md", "text")
    above: list[str] = []
    for line in block.code.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0]]
        assert (ROOT / "".join(above)).exists(), line


def test_the_tree_has_every_room() -> None:
    (block,) = blocks(ROOT / "README.md", "text")
    rooms = {path.parent.name for path in (ROOT / "reftnoise").glob("*/__init__.py")}
    missing = {room for room in rooms if f"\n  {room}/" not in block.code}
    assert missing <= {"interventions"}


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8000


def test_architectures_are_counted() -> None:
    matrix = TEXTS["architectures.md"].partition("## The matrix")[2].partition("\n\n- ")[0]
    count = len(re.findall(r"^\| [a-z]", matrix, re.MULTILINE))
    assert f"on which of {count} architectures" in TEXTS["README.md"]


def test_every_unit_is_in_the_table() -> None:
    assert all(f"| `{name}` |" in TEXTS["config.md"] for name in INTERVENTIONS)


def test_every_unit_has_its_row_in_the_table_of_methods() -> None:
    """Its parameters, and whether it merges and shares a batch, are those of the class."""
    section = TEXTS["methods.md"].partition("\n## Units\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(\w+)` \|(.*) \|$", section, re.MULTILINE)
    assert [name for name, _ in lines] == list(INTERVENTIONS)
    width, rank, heads = 12, 3, 2
    sizes = {"low_rank_dimension": rank, "head_width": width // heads, "act_fn": None}
    for name, line in lines:
        unit_class = INTERVENTIONS[name]
        if issubclass(unit_class, NoiseIntervention):
            continue
        _, _, count, _, merges, *others = [cell.strip() for cell in line.split("|")]
        known = {*inspect.signature(unit_class).parameters, *argument_defaults(unit_class)}
        taken = {argument: size for argument, size in sizes.items() if argument in known}
        unit: Any = unit_class(embed_dim=width, **taken).eval()
        product = re.sub(r"(?<=\w)(?=[a-z])", " * ", count)  # 2rd is 2 * r * d
        expected = eval(product, {"r": rank, "d": width, "n": heads})
        assert sum(parameter.numel() for parameter in unit.parameters()) == expected
        for vector in unit.buffers():
            vector.fill_(1.0)
        assert has_factors(unit)
        assert not any(act for act, _ in unit.factors().acts)
        assert merges == ("without σ" if "act_fn" in taken else "yes")
        assert others == ["yes", "yes"]
