"""The command line: a dictionary of command → function, heavy imports inside the functions."""

import sys


def demo(output_dir: str = "reftnoise-demo", seed: int = 0) -> None:
    """Train the embedded tiny model and show its answers before and after.

    Args:
        output_dir: directory for the adapter.
        seed: of all random draws.
    """
    from .demo import run_demo

    run_demo(output_dir, seed)


COMMANDS = {"demo": demo}


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
