"""What holds the house together: floors, rooms of a size, and who may reach for what.

`EXCEPTIONS` may only shrink.
"""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = sorted((ROOT / "interventions").glob("*.py"))
PACKAGE = ROOT / "reftnoise"
SYSTEM = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if "interventions" not in path.parts[len(PACKAGE.parts) :] and "__pycache__" not in path.parts
)
# An import goes down, or stays on its floor within one room.
FLOORS = [
    {"_util", "interventions"},
    {"config"},
    {"engine"},
    {"adapters", "data"},
    {"model"},
    {"evaluation"},
    {"training"},
    {"pyreft"},
    {"analysis"},
    {"inference"},
    {"cli"},
    {"__init__", "__main__"},
]
# Within the engine, from what knows the base alone to what runs a training pass.
ENGINE = [
    {"base"},
    {"layout"},
    {"locations"},
    {"units"},
    {"settings"},
    {"calls"},
    {"edits"},
    {"hooks"},
    {"generation", "planning"},
    {"training_pass"},
]
MAX_ENTRIES, MAX_LINES, MAX_BODY = 12, 400, 50
EXCEPTIONS: dict[str, list[tuple[str, str]]] = {
    "libraries are dependencies": [
        ("analysis/report/figures.py:cycler", "matplotlib has it"),
        ("evaluation/lm_eval.py:tqdm", "lm_eval and datasets have it"),
    ],
    "private names stay private": [
        ("interventions/kept.py:_version", "torch tells of in-place changes nowhere else"),
        ("training/study/cell.py:_exit", "os has no public name for it"),
    ],
    "hooks are registered in two rooms": [
        ("inference/vllm/worker.py", "vLLM runs its own model, of which the engine knows nothing"),
    ],
}
"""By test, what it finds and why that may stay."""

OPTIONAL = {
    *("bitsandbytes", "deepspeed", "fastapi", "gradio", "lm_eval", "matplotlib", "openai"),
    *("optuna", "peft", "torchao", "trl", "uvicorn", "vllm"),
}
FOREIGN_PRIVATE = ("engine/base/", "engine/training_pass/tracing.py", "inference/vllm/")
HOOKING = ("engine/", "analysis/")

by_file = {"ids": lambda path: str(path.relative_to(ROOT))}


def named(path: Path) -> str:
    """A file as `engine/calls.py`."""
    return str(path.relative_to(PACKAGE))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of what an import statement imports; relative where level > 0."""
    match node:
        case ast.Import(names=names):
            return [(0, alias.name) for alias in names]
        case ast.ImportFrom(module=None, names=names, level=level):
            return [(level, alias.name) for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=level):
            return [(level, f"{module}.{alias.name}") for alias in names]
    return []


def module_of(path: Path) -> str:
    """A file as `engine.calls`; a room's `__init__` as the room."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in SYSTEM}


@cache
def internal(path: Path) -> frozenset[str]:
    """The modules of reftnoise that a file imports: at once, in functions or for type checkers."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        for level, name in imports(node):
            parts = name.split(".")
            if level:
                parts = [*package[: len(package) - level + 1], *parts]
            elif parts[0] != "reftnoise":
                continue
            else:
                parts = parts[1:]
            if parts and parts[0] == "interventions":
                found.add("interventions")
                continue
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return frozenset(found - {module_of(path)})


def external(path: Path) -> set[str]:
    return {
        name.split(".")[0]
        for node in ast.walk(tree(path))
        for lvl, name in imports(node)
        if not lvl
    }


def check(test: str, found: Iterable[str]) -> None:
    """What a test finds is what its exceptions list, place for place."""
    allowed = {place for place, _ in EXCEPTIONS.get(test, ())}
    assert set(found) == allowed


def floor(module: str, floors: list[set[str]]) -> int:
    first = module.split(".", maxsplit=1)[0]
    return next(number for number, rooms in enumerate(floors) if first in rooms)


# -- interventions -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MATHS, **by_file)
def test_the_maths_imports_torch_and_its_siblings(path: Path) -> None:
    allowed = {"torch", "jaxtyping", "typing_extensions", *sys.stdlib_module_names}
    allowed |= {"pyvene"} if path.name == "base.py" else set()
    names = {other.stem for other in MATHS}
    for level, name in (found for node in ast.walk(tree(path)) for found in imports(node)):
        if level:
            assert level == 1
            assert name.split(".")[0] in names
        else:
            is_activation = name.startswith("transformers.activations.")
            assert is_activation or name.split(".")[0] in allowed


def test_the_package_maps_the_folder() -> None:
    assert (PACKAGE / "interventions").resolve() == ROOT / "interventions"


# -- floors --------------------------------------------------------------------------------------


def test_every_room_has_a_floor() -> None:
    rooms = {module.split(".")[0] for module in MODULES} | {"interventions"}
    assert rooms == set().union(*FLOORS)
    inner = {module.split(".")[1] for module in MODULES if module.startswith("engine.")}
    assert inner == set().union(*ENGINE)


def test_imports_go_down() -> None:
    up = []
    for module, path in MODULES.items():
        for other in internal(path):
            here, there = floor(module, FLOORS), floor(other, FLOORS)
            same_room = module.split(".")[0] == other.split(".")[0]
            if there > here or (there == here and not same_room and here):
                up.append(f"{module} → {other}")
    check("imports go down", up)


def test_imports_within_the_engine_go_down() -> None:
    up = []
    for module, path in MODULES.items():
        room, _, inner = module.partition(".")
        if room != "engine" or not inner:
            continue
        for other in internal(path):
            if not other.startswith("engine."):
                continue
            rest = other.partition(".")[2]
            if floor(rest, ENGINE) > floor(inner, ENGINE):
                up.append(f"{module} → {other}")
    check("imports within the engine go down", up)


def test_no_module_depends_on_itself() -> None:
    needs = {module: set(internal(path)) for module, path in MODULES.items()}
    # An import of a room runs its `__init__`, which therefore may name nothing of the room at once.
    reached = {module: set(direct) for module, direct in needs.items()}
    for _ in reached:
        for direct in reached.values():
            direct |= {further for other in tuple(direct) for further in needs.get(other, ())}
    check("circles", [module for module, others in reached.items() if module in others])


def test_nobody_imports_the_command_line() -> None:
    importers = {m for m, p in MODULES.items() if any(o.startswith("cli") for o in internal(p))}
    assert {m for m in importers if not m.startswith("cli")} == {"__main__"}


def test_importing_the_package_imports_none_of_its_modules() -> None:
    imported = {name for node in tree(PACKAGE / "__init__.py").body for _, name in imports(node)}
    assert imported == {"ast", "importlib.import_module", "pathlib.Path", "typing.Any"}


# -- sizes ---------------------------------------------------------------------------------------


def test_rooms_are_small() -> None:
    folders = defaultdict(set)
    for path in PACKAGE.rglob("*"):
        if "__pycache__" not in path.parts and path.parent.name != "tiny-chat":
            folders[path.parent].add(path.name)
    check(
        "rooms are small",
        [named(f) for f, names in folders.items() if len(names) > MAX_ENTRIES and f != PACKAGE],
    )
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__init__.pyi", "__main__.py", "model.py", "py.typed"}


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SYSTEM + MATHS}
    long = [str(p.relative_to(ROOT)) for p, lines in lengths.items() if lines > MAX_LINES]
    check("files are short", long)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def visit(
        node: ast.AST, prefix: str
    ) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            else:
                yield from visit(child, prefix)

    yield from visit(tree(path), "")


def test_functions_need_no_scrolling() -> None:
    long = []
    for path in SYSTEM + MATHS:
        for name, function in functions(path):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > MAX_BODY:
                long.append(f"{path.relative_to(ROOT)}:{name}")
    check("functions need no scrolling", long)


# -- who may reach for what ----------------------------------------------------------------------


def private(path: Path) -> set[str]:
    """Private attributes that a file takes from objects which it does not define them on."""
    own = {
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    taken = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            for target in targets:
                own |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
                own |= {
                    n.attr
                    for n in ast.walk(target)
                    if isinstance(n, ast.Attribute)
                    and isinstance(n.value, ast.Name)
                    and n.value.id == "self"
                }
        if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            taken |= set() if of_itself else {node.attr}
    return taken - own


def test_private_names_stay_private() -> None:
    found = []
    for path in SYSTEM + MATHS:
        place = named(path) if PACKAGE in path.parents else f"interventions/{path.name}"
        if not place.startswith(FOREIGN_PRIVATE):
            found += [f"{place}:{name}" for name in private(path)]
    check("private names stay private", found)


def test_private_names_are_not_imported() -> None:
    found = []
    for path in SYSTEM + MATHS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom):
                names = [
                    a.name
                    for a in node.names
                    if re.match(r"_[a-zA-Z]", a.name) and a.name != "_util"
                ]
                found += [f"{path.relative_to(ROOT)}:{name}" for name in names]
    check("private names are not imported", found)


def test_hooks_are_registered_in_two_rooms() -> None:
    pattern = re.compile(r"\.register_(forward|full_backward)\w*hook\(")
    places = {named(p) for p in SYSTEM if pattern.search(p.read_text(encoding="utf-8"))}
    check("hooks are registered in two rooms", [p for p in places if not p.startswith(HOOKING)])


def test_classes_and_aliases_have_names_of_their_own() -> None:
    names = Counter[str]()
    for path in SYSTEM + MATHS:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
                names[ast.unparse(node.target)] += 1
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
                targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
                names.update(t for t in targets if re.match(r"[A-Z][a-z]", t))
    check("names of their own", [name for name, count in names.items() if count > 1])


def test_an_optional_library_is_imported_in_one_room() -> None:
    rooms = defaultdict(set)
    for path in SYSTEM:
        for library in external(path) & OPTIONAL:
            rooms[library].add(str(path.parent.relative_to(PACKAGE)))
    found = [f"{name} in {', '.join(sorted(r))}" for name, r in rooms.items() if len(r) > 1]
    check("optional libraries", found)


def test_imported_libraries_are_dependencies() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("[project]") : text.index("[project.scripts]")]
    declared = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)[\w.\[,\]]*[">]', project)}
    known = declared | OPTIONAL | {"reftnoise"} | sys.stdlib_module_names
    found = [f"{named(path)}:{name}" for path in SYSTEM for name in external(path) - known]
    check("libraries are dependencies", found)


@pytest.mark.parametrize("module", ["cli.main", "training.recipe", "config.positions"])
def test_what_starts_quickly_loads_no_torch(module: str) -> None:
    code = f"import sys, reftnoise.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- words ---------------------------------------------------------------------------------------


def documented(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Public classes and functions of a file, and public methods of its public classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree(path).body:
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        yield node.name, node
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield f"{node.name}.{child.name}", child


def arguments(doc: str) -> list[str] | None:
    """The names in a docstring's `Args:`; None where there is none."""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    return None if match is None else re.findall(r"^ {4}(\w+): ", match[1], re.MULTILINE)


def parameters(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not init:
            return [ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)]
        node = init[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    names += [a.arg for a in (spec.vararg, spec.kwarg) if a is not None]
    return [name for name in names if name not in ("self", "cls")]


def inherited(path: Path, name: str, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether a method is one of a class of another library, or documented where it comes from."""
    owner, _, method = name.rpartition(".")
    node = classes.get(owner)
    for base in node.bases if node is not None else ():
        text = ast.unparse(base).split("[")[0].rpartition(".")[2]
        if text in ("Mapping", "NamedTuple", "Protocol", "ABC", "Generic"):
            continue
        if text not in classes:
            return True
        own = [n for n in classes[text].body if isinstance(n, ast.FunctionDef) and n.name == method]
        if any(ast.get_docstring(n) for n in own) or inherited(path, f"{text}.{method}", classes):
            return True
    return False


def test_public_names_are_documented() -> None:
    found = []
    nodes = [node for path in SYSTEM + MATHS for node in tree(path).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for path in SYSTEM + MATHS:
        for name, node in documented(path):
            doc = ast.get_docstring(node)  # type: ignore[arg-type]
            place = f"{path.relative_to(ROOT)}:{name}"
            setters = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            if doc is None and any(setter.endswith(".setter") for setter in setters):
                continue
            if doc is None:
                found += [] if inherited(path, name, classes) else [place]
                continue
            listed = arguments(doc)
            if listed is not None and listed != [n for n in parameters(node) if n in listed]:
                found.append(f"{place}({', '.join(listed)})")
            elif listed is not None and set(listed) != set(parameters(node)):
                if isinstance(node, ast.ClassDef):
                    continue  # a dataclass' fields may have docstrings of their own
                found.append(f"{place} lacks {sorted(set(parameters(node)) - set(listed))}")
    check("documented", found)


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
