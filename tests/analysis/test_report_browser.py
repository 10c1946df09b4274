"""The report in a real browser, on a phone's width and on a large screen's."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reftnoise.analysis.report import write_report
from support.report_directories import make_run, make_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH = 390

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

MEASURE = """
const frame = document.querySelector("iframe"), page = frame.contentDocument;
page.querySelectorAll("details").forEach(part => part.open = true);
const beyond = [...page.querySelectorAll("main > section > *, header > *")]
  .filter(part => part.getBoundingClientRect().right > frame.clientWidth);
document.body.textContent = "measured" + JSON.stringify({
  viewport: page.documentElement.clientWidth,
  width: page.documentElement.scrollWidth,
  height: page.documentElement.scrollHeight,
  beyond: beyond.map(part => part.className || part.tagName),
  broken: [...page.images].filter(image => !image.naturalWidth).length,
  images: page.images.length,
  widths: [...page.querySelectorAll(".narrow img")].map(image => image.clientWidth),
  hidden: [...page.images].map(image => image.getBoundingClientRect().right)
    .filter(right => right > frame.clientWidth),
  cut: [...page.querySelectorAll("td.text")]
    .filter(cell => cell.getBoundingClientRect().right > frame.clientWidth).length,
  scrolled: [...page.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth).length,
}) + "end";
"""


def measured(page: Path, tmp_path: Path, width: int = WIDTH) -> dict[str, Any]:
    """The page in a frame, since a window of Chromium is at least 500 pixels wide."""
    outer = tmp_path / "phone.html"
    inner = html.escape(page.read_text(encoding="utf-8"))
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe width="{width}" height="844" '
        f'style="border: 0" srcdoc="{inner}"></iframe>'
        f'<script>addEventListener("load", () => {{{MEASURE}}});</script>',
        encoding="utf-8",
    )
    assert CHROMIUM is not None
    flags = [
        "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, outer.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"measured(\{.*\})end", done.stdout)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("kind", ["run", "study"])
def test_everything_fits_a_phone_and_uses_a_large_screen(tmp_path: Path, kind: str) -> None:
    if kind == "run":
        prompts = ["A question with a very long word in it, " + "and" * 60 + "? " + "Yes. " * 9]
        directory = make_run(tmp_path / kind)
        write_report(directory, prompts=prompts)
    else:
        directory = make_study(tmp_path / kind, axes=("noise", "data"))
        write_report(directory)
    found = measured(directory / "report.html", tmp_path)
    assert found["viewport"] == WIDTH
    assert found["width"] <= WIDTH
    assert found["height"] > 844
    assert found["beyond"] == []
    assert found["broken"] == 0
    assert found["images"] >= 2
    assert found["scrolled"] >= 1
    assert found["cut"] == 0
    assert found["hidden"] == []
    wide = measured(directory / "report.html", tmp_path, 1280)
    assert (wide["width"], wide["beyond"], wide["cut"]) == (1280, [], 0)
    assert min(wide["widths"]) > 560
