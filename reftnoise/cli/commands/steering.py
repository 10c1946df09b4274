"""The command that chooses a steering vector.

Heavy imports are inside the functions: `--help` and mistakes do not wait for torch.
"""

from typing import Any

from ..._util.files import local_path
from ..._util.numbers import significant
from ...analysis.steering.options import SteerOptions, VectorChoice, expect_room
from ...analysis.steering.pairs import read_pairs
from ...config.base_model import expect_base
from ..printing import print_json, progress_console


def steer(
    pairs: str,
    options: SteerOptions,
    model: str | None = None,
    output_dir: str = "steering",
    server: str | None = None,
    captures: str | None = None,
    api_key: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Fit steering vectors at all layers, choose layer and strength by held-out pairs, and save it.

    Half of the pairs fit the vectors, a quarter chooses one, and a quarter tests it. With a server,
    all pairs fit one vector, whose layer, method and size or scale are given.

    Args:
        pairs: file of rows with positive and negative prompts, or a question, its matching and
            its not_matching answer.
        options: what is tried, and what a vector may cost.
        model: directory or hub name of the base, or tiny-chat.
        output_dir: directory for the adapter, the results and the picture.
        server: address of a running vLLM that reads the states, and then serves the vector.
        captures: folder of the server's reft_capture.
        api_key: key that the server asks for.
        dtype: dtype of the base, such as bfloat16.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        overwrite: whether the results of an earlier search in output_dir are replaced.
        quiet: whether nothing but errors is printed.
        json: whether the results are printed as JSON, without progress.
    """
    if model is None:  # no default; jsonargparse makes a required option positional
        raise ValueError("steer: expected --model, the name or path of the base model")
    expect_base(model, dtype)
    if (server is None) != (captures is None):
        raise ValueError("steer: expected --server and --captures, the folder of its reft_capture")
    if server is not None:
        VectorChoice.of(options)
        for name, value in {"dtype": dtype, "device": device}.items():
            if value != "auto":
                raise ValueError(f"{name} {value!r}: a server has its own; expected none")
    place = local_path(output_dir, "output_dir")
    expect_room(place, overwrite=overwrite)
    read_pairs(pairs)
    if server is not None and captures is not None:
        from ...inference.vllm.steering import steer_server

        results = steer_server(
            pairs,
            model,
            place,
            options,
            server=server,
            captures=captures,
            api_key=api_key,
            overwrite=overwrite,
            console=progress_console(quiet or json),
        )
        if json:
            print_json(results)
        elif not quiet:
            print_served(results, output_dir)
        return
    from ...analysis.steering.search import search

    console = progress_console(quiet or json)
    results = search(
        pairs,
        model,
        place,
        options,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        console=console,
    )
    if json:
        print_json(results)
    elif not quiet:
        print_steering(results, output_dir)
    _draw(place, results)


def print_steering(results: dict[str, Any], directory: str) -> None:
    """Print the choice, its curve, and what it does on held-out questions."""
    from rich.console import Console
    from rich.table import Table

    def interval(values: dict[str, float], *, sign: bool = False) -> str:
        mean, *ends = (significant(values[key], 3, sign=sign) for key in ("mean", "low", "high"))
        return f"{mean} ({' to '.join(ends)})"

    chosen, test, pairs = results["chosen"], results["test"], results["pairs"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("‖edit‖ / ‖h‖", "scale", "shift (95 %)", "KL, nats (95 %)", ""):
        table.add_column(name)
    for point in results["curve"]:
        is_chosen = point["scale"] == chosen["scale"]
        table.add_row(
            f"{point['size']:.2g}",
            f"{point['scale']:.3g}",
            interval(point["shift"], sign=True),
            interval(point["kl"]),
            "chosen" if is_chosen else "",
        )
    console = Console(highlight=False)
    console.print(
        f"Chosen on {pairs['choose']} questions: {chosen['method']}, layer {chosen['layer']}, "
        f"scale {chosen['scale']:.3g}, ‖edit‖ / ‖h‖ {chosen['size']:.2g}"
    )
    console.print(table)
    console.print(
        f"Test on {pairs['test']} other questions: P(matching) {significant(test['base'], 3)} → "
        f"{significant(test['steered'], 3)}, shift {interval(test['shift'], sign=True)}, "
        f"KL {interval(test['kl'])}"
    )
    print(f"The adapter is in {directory}/adapter. Next:\n  reftnoise chat {directory}")


def print_served(results: dict[str, Any], directory: str) -> None:
    """Print the vector that a server has."""
    chosen, name = results["chosen"], results["name"]
    print(
        f"From {results['pairs']['fit']} pairs: {chosen['method']}, layer {chosen['layer']}, scale "
        f"{chosen['scale']:.3g}, ‖edit‖ / ‖h‖ {chosen['size']:.2g}\n"
        f"The adapter is in {directory}/adapter, and {results['server']} serves it as {name!r}."
    )


def _draw(place: Any, results: dict[str, Any]) -> None:
    """Write the picture, if matplotlib is there."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is not None:
        from ...analysis.report import write_steering

        write_steering(place, results)
