"""Dependencies point one way, and importing the library is silent and keeps to its own name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = sorted((ROOT / "interventions").glob("*.py"))
by_file = {"ids": lambda path: str(path.relative_to(ROOT))}


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
