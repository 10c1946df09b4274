"""Kill training at random instants, resume it, and compare with the run that was not killed.

python tests/training/kills.py 60            # of `train`, with and without a prefix cache in turn
python tests/training/kills.py 100 trainer   # of `ReftTrainer`, in the same turns
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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reftnoise._util import yaml
from reftnoise.cli.main import main

CACHES: tuple[Any, ...] = ("none", "memory", "disk")
UNIT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "l1"}
RECIPE = {
    "representations": [UNIT],
    "data": {"train": "tiny-chat", "train_split": "train[:16]", "template": "chat"},
    "training": {"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 4},
    "evaluation": {"data": "tiny-chat", "split": "test[:4]", "max_new_tokens": 4},
    "device": "cpu",
}


def command(cache: Any, directory: Path) -> None:
    """Run `train`, or resume it where it has begun."""
    file = directory.parent / f"{cache}.yaml"
    training = RECIPE["training"] | {"prefix_cache": cache}
    file.write_text(yaml.dump(RECIPE | {"training": training}))
    is_begun = directory.exists() and any(directory.iterdir())
    options = ["--quiet", "--output_dir", str(directory), *(["--resume"] if is_begun else [])]
    silent = io.StringIO()
    with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        code = main(["train", str(file), *options])
    if code:
        raise RuntimeError(f"exit code {code}: {silent.getvalue().splitlines()[-1:]}")


def trainer(cache: Any, directory: Path) -> None:
    """Run a `ReftTrainer`, or resume it where there is a checkpoint."""
    import transformers

    import reftnoise as rn
    from reftnoise.training.trainer import find_checkpoint

    silent = io.StringIO()
    with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        transformers.set_seed(0)
        model, tokenizer = rn.load_tiny_model()
        reft_model = rn.get_reft_model(model, rn.ReftConfig([UNIT | {"dropout": 0.2}]))
        examples = rn.load_tiny_examples("train")[:16]
        data = rn.make_last_position_supervised_data_module(
            tokenizer,
            reft_model,
            [example.prompt for example in examples],
            [example.completion for example in examples],
            chat_template=True,
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(directory),
            max_steps=12,
            save_steps=3,
            per_device_train_batch_size=4,
            weight_decay=0.1,
            warmup_steps=2,
            report_to="none",
            use_cpu=True,
        )
        run = rn.ReftTrainer(reft_model, arguments, prefix_cache=cache, **data)
        run.train(resume_from_checkpoint=find_checkpoint(str(directory)) is not None)
        run.save_model(str(directory / "adapter"))


WAYS: dict[str, tuple[Callable[[Any, Path], None], tuple[str, ...]]] = {
    "command": (command, ("adapter/reft_model.safetensors", "scores.json", "predictions.jsonl")),
    "trainer": (trainer, ("adapter/reft_model.safetensors",)),
}
"""Each way to train, with the files that must be the same at its end."""


def killed(train: Callable[[Any, Path], None], cache: Any, directory: Path, seconds: float) -> bool:
    """Whether a child that trains was killed before its end.

    This process trains nothing itself: autograd's threads would be missing in its children.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # SIGALRM ends it at once, as SIGKILL does.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            train(cache, directory)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"{cache}: exit code {os.waitstatus_to_exitcode(status)}")
    return os.WIFSIGNALED(status)


def campaign(count: int, way: str = "command") -> tuple[int, int]:
    """Kill so many runs at random instants, and resume them.

    Returns:
        The number of kills after a checkpoint, and of runs that ended otherwise than the run that
        was not killed.
    """
    import reftnoise.training.run  # noqa: F401  # before the fork

    train, files = WAYS[way]
    draw, kills, later, bad = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        lasts = {}
        for cache in CACHES:
            started = time.monotonic()
            assert not killed(train, cache, Path(folder) / f"whole-{cache}", 600)
            lasts[cache] = time.monotonic() - started
        while kills < count:
            cache = CACHES[kills % len(CACHES)]
            run, whole = Path(folder) / "run", Path(folder) / f"whole-{cache}"
            shutil.rmtree(run, ignore_errors=True)
            if killed(train, cache, run, draw.uniform(0, lasts[cache])):
                kills += 1
                later += any(run.rglob("checkpoint-*/trainer_state.json"))
                assert not killed(train, cache, run, 600)
            same = all((run / n).read_bytes() == (whole / n).read_bytes() for n in files)
            extra = {p.name for p in run.iterdir()} ^ {p.name for p in whole.iterdir()}
            if not same or extra:
                bad += 1
                print(f"kill {kills}, {cache}: {same=}, {extra=}", flush=True)
    return later, bad


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    later, bad = campaign(int(sys.argv[1]), *sys.argv[2:])
    print(f"{sys.argv[1]} kills, {later} of them after a checkpoint; {bad} runs differ")
