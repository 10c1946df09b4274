"""The command line: a dictionary of command → function, heavy imports inside the functions."""

import sys

from .bench.workload import Workload


def demo(output_dir: str = "reftnoise-demo", seed: int = 0) -> None:
    """Train the embedded tiny model and show its answers before and after.

    Args:
        output_dir: directory for the adapter.
        seed: of all random draws.
    """
    from .demo import run_demo

    run_demo(output_dir, seed)


def bench(
    work: Workload | None = None,
    vary: str | None = None,
    values: list[int] | None = None,
    sides: list[str] | None = None,
    rounds: int = 7,
    threads: int = 1,
    memory: bool = False,
    generation: bool = False,
    device: str = "cpu",
    output_dir: str = "reftnoise-bench",
) -> None:
    """Measure training steps and generation beside the floor, LoRA, NEFTune and pyreft.

    The floor is the frozen base's forward pass, with logits everywhere, and the backward pass down
    to the first edited layer's output. Without work, vary and sides, README's table is measured,
    in about ten minutes.

    Args:
        work: one workload instead of the table.
        vary: a number of the workload to go through `values`, such as rank or layers.
        values: of what is varied.
        sides: of floor, plain, split, reuse, symnoise, compiled, lora, neftune, pyreft; by default
            all but compiled.
        rounds: interleaved measurements of each side.
        threads: of torch.
        memory: also measure the peak memory of each side, in a process of its own.
        generation: also measure generation.
        device: cpu or cuda, for README's table.
        output_dir: directory for results.json, results.md and results.png.
    """
    from .bench.run import run_bench

    run_bench(
        work,
        vary=vary,
        values=values or [],
        sides=sides or [],
        rounds=rounds,
        threads=threads,
        memory=memory,
        generation=generation,
        device=device,
        output_dir=output_dir,
    )


def convert(
    source: str,
    output: str,
    base: str | None = None,
    positions: list[int] | str = "l1",
    dropout: float = 0.0,
    act_fn: str | None = None,
) -> None:
    """Write an adapter of pyreft or pyvene as one of reftnoise, or one of reftnoise as pyreft's.

    What the other format does not hold is told.

    Args:
        source: adapter directory of either kind, or a hub repository that is one.
        output: directory for the other kind; new, empty, or an adapter of that kind to replace.
        base: name or path of the base model, always needed; only its config is read.
        positions: where a pyreft adapter edits, such as f7+l7.
        dropout: of a pyreft adapter, for training it further.
        act_fn: of a pyreft adapter, by transformers' name.
    """
    from .convert import convert as convert_adapter

    if base is None:  # no default; jsonargparse 4.40 makes a required option positional
        raise ValueError("convert: expected --base, the name or path of the base model")
    print(
        convert_adapter(
            source, output, base=base, positions=positions, dropout=dropout, act_fn=act_fn
        )
    )


COMMANDS = {"demo": demo, "bench": bench, "convert": convert}


def main(argv: list[str] | None = None) -> int:
    """Run a command; what the user got wrong is one line on stderr and exit code 2."""
    from jsonargparse import auto_cli

    try:
        auto_cli(COMMANDS, args=argv)
    except (ValueError, OSError) as error:
        print(f"reftnoise: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
