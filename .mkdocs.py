"""What `.mkdocs.yml` builds: README, guides, and a page of the API reference for each room."""

import re
from collections import defaultdict
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent
GUIDES = (
    *(
        "config",
        "commands",
        "training",
        "speed",
        "adapters",
        "steering",
        "serving",
        "methods",
        "trl",
    ),
    *("devices", "architectures", "pyreft", "internals"),
)
OTHERS = ("CHANGELOG.md", ".github/CONTRIBUTING.md")
ROOMS = ("model", "config", "interventions", "data", "training", "evaluation", "adapters")
ROOMS += ("analysis", "inference", "engine", "pyreft")
MORE = (
    "adapters.library.AdapterLibrary",
    "analysis.curvature",
    "analysis.inspection",
    "data.tasks.base",
    "data.tasks.registry.get_task",
    "evaluation.forgetting",
    "evaluation.lm_eval.ReftLM",
    "evaluation.scoring.Evaluation",
    "evaluation.scoring.evaluate",
    "training.recipe",
    "training.study.grid.Rule",
    "training.study.grid.Study",
)
"""What the reference shows apart from the names of `rn`."""
MODULES = ("pyreft.dataset", "pyreft.reft_model", "pyreft.reft_trainer", "pyreft.utils")
"""Names of `rn` that are modules, whose contents the reference shows."""

_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Order the pages."""
    guides = [{guide: f"examples/guides/{guide}.md"} for guide in GUIDES]
    api = [{room: f"api/{room}.md"} for room in ROOMS]
    about = [{"Changelog": OTHERS[0]}, {"Contributing": OTHERS[1]}]
    config.nav = [{"reftnoise": "README.md"}, {"Guides": guides}, {"API": api}, {"About": about}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Lay pages out as in the repository, so that their links lead to the same places."""
    paths = ["README.md", *OTHERS, *(f"examples/guides/{guide}.md" for guide in GUIDES)]
    for path in paths:  # which grows by what pages link to
        if path.endswith(".md"):
            folder = (ROOT / path).parent
            links = _LINK.findall((ROOT / path).read_text(encoding="utf-8"))
            linked = [str((folder / link).resolve().relative_to(ROOT)) for link in links]
            paths += [name for name in dict.fromkeys(linked) if name not in paths]
    pages = [
        File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=_KEPT)
        for path in paths
    ]
    pages[paths.index(OTHERS[1])].dest_uri = "contributing.html"
    for room, text in _reference().items():
        pages.append(File.generated(config, f"api/{room}.md", content=text))
    theme = [file for file in files if file.src_uri not in {Path(path).name for path in paths}]
    return Files([*theme, *pages])


_KEPT = InclusionLevel.INCLUDED


def _reference() -> dict[str, str]:
    """The Markdown of each room's page."""
    package = griffe.load("reftnoise", search_paths=[str(ROOT)])
    targets = {member.target_path for member in package.members.values() if member.is_alias}
    names = {target for target in targets if target.startswith("reftnoise.")}
    names -= {f"reftnoise.{path}" for path in MODULES}
    by_room: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names | {f"reftnoise.{name}" for name in MORE}):
        by_room[name.split(".")[1]].append(name)
    if set(by_room) != set(ROOMS):
        raise ValueError(f"ROOMS {ROOMS}: expected {', '.join(by_room)}")
    return {
        room: f"# {room}\n\n" + "\n".join(f"::: {name}\n" for name in names)
        for room, names in by_room.items()
    }


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without scripts."""
    return _MATHS.sub(lambda match: convert(unescape(match[2])), html)
