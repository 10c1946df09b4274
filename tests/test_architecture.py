"""Dependencies point one way, and importing the library is silent and keeps to its own name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = sorted((ROOT / "interventions").glob("*.py"))
SYSTEM = [
    path
    for folder in (".", "bench", "integrations", "playground", "report", "study", "tasks")
    for path in sorted((ROOT / "reftnoise" / folder).glob("*.py"))
]

# Every module of reftnoise, from what depends on nothing to what depends on everything.
LAYERS = [
    {"decoding", "files", "interventions", "hints", "recipe", "run_files", "tiny", "yaml_text"},
    {
        "checkpointing",
        "compiled",
        "composition",
        "devices",
        "listening",
        "loss",
        "machine",
        "pairs",
        "parsing",
        "positions",
        "prefix_cache",
        "quantised",
        "tasks",
        "tokenization",
        "turns",
    },
    {"components"},
    {"config", "fused", "inputs", "split", "probe", "pyreft_state"},
    {"chunks"},
    {"editing"},
    {"engine"},
    {"tracing"},
    {"locating", "passes", "placement", "stacking", "subspaces"},
    {"adapter_files", "base_sample", "card", "training_checks", "edited_generation"},
    {"library", "model", "saving", "wrapped"},
    {"bases", "sources"},
    {"templates"},
    {"encoding", "progress"},
    {"streams", "token_cache"},
    {"classifiers", "data", "generation", "trainer", "likelihood"},
    {"demo", "bench", "pyreft_directory", "convert", "integrations"},
    {"evaluation", "inspection", "overlaps", "steering", "loading", "describe"},
    {"answers"},
    {"chat", "playground", "serve", "runs", "run_directory", "run_evaluation", "printing"},
    {"study"},
    {"report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
# Who may import inside a function: `saving` builds a ReftModel, lm-evaluation-harness is an extra,
# commands start quickly.
LATE = {
    "saving": {"model"},
    "run_evaluation": {"integrations"},
    "cli": {"loading", "parsing"},
    "commands": set(LEVEL) - {"cli", "__main__"},
    "demo": set(LEVEL) - {"__main__"},
}

by_file = {"ids": lambda path: str(path.relative_to(ROOT))}


def module(path: Path) -> str:
    """The module of reftnoise that a file is, or the folder of modules that it belongs to."""
    return path.stem if path.parent.name in ("reftnoise", "interventions") else path.parent.name


def imports(node: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of what an import statement imports; relative where level > 0."""
    match node:
        case ast.Import(names=names):
            return [(0, alias.name) for alias in names]
        case ast.ImportFrom(module=None, names=names, level=level):
            return [(level, alias.name) for alias in names]
        case ast.ImportFrom(module=str(module), level=level):
            return [(level, module)]
    return []


def statements(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes but those for type checkers alone, and whether each runs late, in a function."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from statements(child, True)
            case _:
                yield child, is_late
                yield from statements(child, is_late)


def internal(path: Path) -> tuple[set[str], set[str]]:
    """The modules of reftnoise that a file imports when it is imported, and in its functions."""
    found: tuple[set[str], set[str]] = set(), set()
    depth = len(path.relative_to(ROOT / "reftnoise").parts)
    for node, is_late in statements(ast.parse(path.read_text(encoding="utf-8"))):
        for level, name in imports(node):
            first, *rest = name.split(".")
            if level == depth:
                found[is_late].add(first)
            elif first == "reftnoise":
                found[is_late].add(rest[0] if rest else "__init__")
    return found


# -- interventions -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MATHS, **by_file)
def test_the_maths_imports_torch_and_its_siblings(path: Path) -> None:
    allowed = {"torch", "jaxtyping", "typing_extensions", *sys.stdlib_module_names}
    allowed |= {"pyvene"} if path.name == "base.py" else set()
    names = {other.stem for other in MATHS}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for level, name in (found for node in ast.walk(tree) for found in imports(node)):
        if level:
            assert level == 1
            assert name.split(".")[0] in names
        else:
            assert name == "transformers.activations" or name.split(".")[0] in allowed


def test_the_package_maps_the_folder() -> None:
    assert (ROOT / "reftnoise" / "interventions").resolve() == ROOT / "interventions"


# -- reftnoise -----------------------------------------------------------------------------------


def test_every_module_has_a_layer() -> None:
    assert sum(map(len, LAYERS)) == len(LEVEL)
    assert {module(path) for path in SYSTEM} - {"__init__"} == set(LEVEL) - {"interventions"}


@pytest.mark.parametrize("path", [p for p in SYSTEM if module(p) != "__init__"], **by_file)
def test_dependencies_point_one_way(path: Path) -> None:
    now, _ = internal(path)
    for name in now:
        assert LEVEL[name] <= LEVEL[module(path)], f"{path.name} imports {name}"


def test_no_module_depends_on_itself() -> None:
    waiting: dict[str, set[str]] = {}
    for path in SYSTEM:
        needs = internal(path)[0] - {"interventions", module(path)}
        waiting[module(path)] = waiting.get(module(path), set()) | needs
    del waiting["__init__"]
    while free := [name for name, needs in waiting.items() if not needs & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, f"a circle of imports among {sorted(waiting)}"


def test_nobody_imports_the_command_line() -> None:
    importers = {module(path) for path in SYSTEM for names in internal(path) if "cli" in names}
    assert importers <= {"__main__"}


@pytest.mark.parametrize("path", SYSTEM, **by_file)
def test_imports_within_functions_are_few(path: Path) -> None:
    _, late = internal(path)
    assert late <= LATE.get(module(path), set())


def test_importing_the_package_imports_none_of_its_modules() -> None:
    now, late = internal(ROOT / "reftnoise" / "__init__.py")
    assert not now | late


def test_importing_is_silent_and_brings_no_bare_interventions(tmp_path: Path) -> None:
    code = (
        "import sys, reftnoise\n"
        "assert reftnoise.ReftModel.__name__ == 'ReftModel'\n"
        "assert 'reftnoise.interventions' in sys.modules\n"
        "assert 'interventions' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
