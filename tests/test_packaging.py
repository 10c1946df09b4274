"""The built wheel and sdist hold what an installation needs."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_the_wheel_works_away_from_the_sources(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(distributions[0]) as wheel:
        assert sum(info.compress_size for info in wheel.infolist()) <= 4 * 2**20
        wheel.extractall(tmp_path)
    assert (tmp_path / "reftnoise" / "py.typed").is_file()
    for data in ("analysis/report/page.html", "evaluation/neutral.jsonl"):
        assert (tmp_path / "reftnoise" / data).is_file()
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import reftnoise as rn
from reftnoise.interventions import INTERVENTIONS
assert all(sys.modules[name].__file__.startswith({str(tmp_path)!r})
           for name in ("reftnoise", "reftnoise.interventions", "reftnoise.interventions.reft"))
config = rn.ReftConfig({{"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}})
rn.get_reft_model(rn.load_tiny_model()[0], config)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_sdist_holds_both_packages(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(ROOT) for path in (ROOT / "interventions").glob("*.py")}
    sources |= {path.relative_to(ROOT) for path in (ROOT / "reftnoise").glob("*.py")}
    assert {str(path) for path in sources} <= names


def test_an_editable_install_is_a_path_that_type_checkers_follow(tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [wheel.read(name).decode().strip() for name in names] == [str(ROOT)]
        assert all(name.endswith(".pth") for name in names), "no import hook"


def test_the_link_shows_the_mapped_package() -> None:
    link = ROOT / "reftnoise" / "interventions"
    assert link.is_symlink()
    assert link.readlink() == Path("../interventions")


def test_every_name_of_the_stub_can_be_imported() -> None:
    import reftnoise

    assert sorted(reftnoise.__all__) == dir(reftnoise)
    assert all(hasattr(reftnoise, name) for name in reftnoise.__all__)
