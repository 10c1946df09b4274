"""Kill `train` at random instants, resume it, and compare with the run that was not killed.

python tests/training/kills.py 60          # with and without a prefix cache, in turn
"""

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from reftnoise._util import yaml
from reftnoise.cli.main import main

FILES = ("adapter/reft_model.safetensors", "scores.json", "predictions.jsonl")
RECIPE = {
    "representations": [
        {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "l1"}
    ],
    "data": {"train": "tiny-chat", "train_split": "train[:16]", "template": "chat"},
    "training": {"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 4},
    "evaluation": {"data": "tiny-chat", "split": "test[:4]", "max_new_tokens": 4},
    "device": "cpu",
}


def train(cache: str, directory: Path, *options: str) -> int:
    """The command's exit code, without what it prints."""
    file = directory.parent / f"{cache}.yaml"
    training = RECIPE["training"] | {"prefix_cache": cache}
    file.write_text(yaml.dump(RECIPE | {"training": training}))
    silent = io.StringIO()
    with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        code = main(["train", str(file), "--quiet", "--output_dir", str(directory), *options])
    if code:
        print(silent.getvalue().splitlines()[-1:], flush=True)
    return code


def killed(cache: str, directory: Path, seconds: float, *options: str) -> bool:
    """Whether a child that runs the command was killed before its end.

    This process trains nothing itself: autograd's threads would be missing in its children.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.setitimer(
                signal.ITIMER_REAL, seconds
            )  # SIGALRM ends it at once, as SIGKILL does
            code = train(cache, directory, *options)
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"{cache} {options}: exit code {os.waitstatus_to_exitcode(status)}")
    return os.WIFSIGNALED(status)


def campaign(count: int) -> int:
    """Kill so many runs; the number of those that did not end as the others."""
    import reftnoise.training.run  # noqa: F401  # before the fork

    draw, bad = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        caches = ("none", "memory", "disk")
        lasts = {}
        for cache in caches:
            started = time.monotonic()
            assert not killed(cache, Path(folder) / f"whole-{cache}", 600)
            lasts[cache] = time.monotonic() - started
        for index in range(count):
            cache = caches[index % len(caches)]
            run, whole = Path(folder) / "run", Path(folder) / f"whole-{cache}"
            shutil.rmtree(run, ignore_errors=True)
            if killed(cache, run, draw.uniform(0, lasts[cache])):
                is_begun = run.exists() and any(run.iterdir())
                killed(cache, run, 600, *(["--resume"] if is_begun else []))
            same = all((run / n).read_bytes() == (whole / n).read_bytes() for n in FILES)
            extra = {p.name for p in run.iterdir()} ^ {p.name for p in whole.iterdir()}
            if not same or extra:
                bad += 1
                print(f"run {index}, {cache}: {same=}, {extra=}", flush=True)
    return bad


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(sys.argv[1], "runs,", campaign(int(sys.argv[1])), "differ")
