"""Progress in a file or a pipe, and on a terminal."""

import io

import pytest
from rich.console import Console

from reftnoise._util import progress
from reftnoise._util.progress import progress_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_file_gets_a_line_for_each_tenth(clock: list[float]) -> None:
    console = Console(file=io.StringIO(), width=20)  # lines are whole, however long
    with progress_of(console, "run [bold]") as show:
        assert show is not None
        for done in range(101):
            show(done, 100, "" if done < 10 else "loss 0.500, 1,000 tokens/s")
            clock[0] += 1.0
    lines = lines_of(console)
    assert lines[0] == "run [bold]: 0/100"
    assert lines[1] == "run [bold]: 10/100, loss 0.500, 1,000 tokens/s, 0:01:30 left"
    assert [line.split(",")[0] for line in lines] == [
        f"run [bold]: {n}/100" for n in range(0, 101, 10)
    ]
    assert lines[-1].endswith("in 0:01:40")


def test_a_slow_step_has_a_line_of_its_own(clock: list[float]) -> None:
    console = Console(file=io.StringIO())
    with progress_of(console, "run", 1000) as show:
        assert show is not None
        for done in range(1, 4):
            clock[0] += 31.0
            show(done, 1000)
        clock[0] += 1.0
        show(4, 1000)
    assert lines_of(console) == [
        "run: 0/1000",
        "run: 1/1000, 8:36:09 left",
        "run: 2/1000, 8:35:38 left",
        "run: 3/1000, 8:35:07 left",
    ]


def test_a_resumed_run_counts_its_own_steps(clock: list[float]) -> None:
    console = Console(file=io.StringIO())
    with progress_of(console, "run") as show:
        assert show is not None
        show(50, 100)
        clock[0] += 10.0
        show(60, 100)
    assert lines_of(console) == ["run: 50/100", "run: 60/100, 0:00:40 left"]


def test_a_terminal_has_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_of(console, "run") as show:
        assert show is not None
        show(1, 2, "loss 0.5")
        show(2, 2, "loss 0.5")
    assert "━" in console.file.getvalue()  # type: ignore[attr-defined]


def test_no_console() -> None:
    with progress_of(None, "run") as show:
        assert show is None
