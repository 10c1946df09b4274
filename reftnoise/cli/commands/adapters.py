"""Commands about what was trained: inspect, heads, report, convert, export, verify.

Heavy imports are inside the functions: `--help` and mistakes do not wait for torch.
"""

import os
from dataclasses import asdict
from pathlib import Path

from ..._util import yaml
from ..._util.files import local_path, replace_all
from ...adapters.location import expect_place
from ...config.base_model import expect_base
from ...config.positions import Positions
from ...inference.api import api_address
from ...inference.export.target import expect_free_directory, expect_target
from ...inference.verification.families import expect_numbers
from ...training.run_adapter import adapter_directory, base_of, recipe_of
from ...training.run_files import is_study
from ..checks import expect_adapters, expect_prompts
from ..printing import print_json, print_wrapped, progress_console

_HEADS = "# Heads that `reftnoise heads` has chosen"
"""The beginning of the recipes that `heads` writes, by which it knows them."""


def inspect_adapter(
    directory: str,
    others: dict[str, str] | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Show what an adapter or a run is: base, units, norms, parameters, scores.

    With others, also how similar the subspaces are that the adapters edit. No base is loaded.

    Args:
        directory: directory of a run or of an adapter, or hub name of an adapter; its last part is
            its name among others.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        output: PNG file for a picture of the overlaps.
        json: whether the result is printed as JSON.
    """
    if others is None and output is not None:
        raise ValueError(
            f"output {output!r}: the picture is of overlaps with others, and there are none; name "
            "some, such as --others.polite runs/polite"
        )
    expect_adapters(directory, others)
    from rich.console import Console

    from ...analysis.description import describe, show

    description, console = describe(directory), Console(highlight=False)
    if others is None:
        print_json(asdict(description)) if json else show(description, console)
        return
    from ...analysis.overlaps import overlaps_by_name, saved_overlaps, show_overlaps
    from ...inference.loading import by_name

    names, overlaps = saved_overlaps(by_name(directory, others))
    if output is not None:
        from ...analysis.report import write_overlaps

        write_overlaps(output, names, overlaps)
    if json:
        print_json(asdict(description) | {"overlaps": overlaps_by_name(names, overlaps)})
    else:
        show(description, console)
        show_overlaps(names, overlaps, console)


def heads(
    directory: str,
    k: int | None = None,
    output: str = "heads.yaml",
    picture: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Choose the heads that a run has scaled most, and write the recipe that trains these alone.

    These are the two steps of LoFiT: the run trains the scaling of all heads, and the recipe
    vectors that are added to the chosen ones.

    Args:
        directory: directory of a run or of an adapter with units at head_output.
        k: number of heads; by default a tenth of all.
        output: file for the recipe, which is the run's own but for its directory and its units at
            heads.
        picture: PNG file for a map of layers and heads.
        model: name or directory of the base, or tiny-chat; by default what the run names.
        overwrite: whether files that this command has not written are replaced; a picture always
            needs it.
    """
    expect_adapters(directory, None, model)
    if k is not None and k < 1:
        raise ValueError(f"k {k}: expected at least 1")
    path = local_path(output, "output")
    if picture is not None and not overwrite and local_path(picture, "picture").exists():
        raise ValueError(f"picture {picture}: exists already: choose another, or --overwrite it")
    _expect_free_file(path, local_path(directory, "directory"), overwrite=overwrite)
    from ...analysis.heads import head_norms, select_heads
    from ...inference.loading import load_adapted

    reft_model, _ = load_adapted(directory, model)
    entries = select_heads(reft_model, k)
    others = [
        entry.to_dict()
        for entry in reft_model.reft_config.representations
        if entry.is_noise or not entry.component.endswith("head_output")
    ]
    own = adapter_directory(directory)
    recipe = recipe_of(own) | (base_of(own) if model is None else {"model": model})
    if model is not None:
        recipe.pop("revision", None)  # of another base
    recipe |= {"representations": [*entries, *others], "output_dir": str(path.with_suffix(""))}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all(path.parent, {path.name: f"{_HEADS}\n{yaml.dump(recipe)}".encode()})
    if picture is not None:
        from ...analysis.report import write_heads

        write_heads(picture, head_norms(reft_model), entries)
    for entry in entries:
        layers = ", ".join(map(str, entry["layer"]))
        print(f"layer {layers}: heads {', '.join(map(str, entry['heads']))}")
    print(f"Next:\n  reftnoise train {path}")


def _expect_free_file(path: Path, first: Path, *, overwrite: bool) -> None:
    """Raise a ValueError unless `heads` may write its recipe to a path."""
    run = path.with_suffix("")
    if run == path or run.resolve() == first.resolve():
        held = "the recipe itself" if run == path else "the first run"
        raise ValueError(
            f"output {path}: the second run's directory is {run}, which is {held}; expected "
            "another name, such as heads.yaml"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"output {path}: expected a file, found a directory")
    if path.is_file() and not overwrite and not path.read_bytes().startswith(_HEADS.encode()):
        raise ValueError(f"output {path}: exists already: choose another, or --overwrite it")


def report(
    directory: str,
    against: str | None = None,
    prompts: list[str] | str | None = None,
    output_dir: str | None = None,
) -> None:
    """Draw the results of a run or a study: a self-contained HTML page and PNG files.

    Args:
        directory: directory of a run or of a study.
        against: directory of another run or adapter, with whose subspaces the run's are compared.
        prompts: one or several prompts that base and adapted model answer side by side.
        output_dir: directory for the report; by default that of the run or study.
    """
    path = local_path(directory, "directory")
    if not is_study(path, against=against, prompts=prompts) and against is not None:
        adapter_directory(against)
    from ...analysis.report import write_report

    texts = [prompts] if isinstance(prompts, str) else prompts
    print(write_report(directory, against=against, prompts=texts, output_dir=output_dir))


def convert(
    source: str,
    output: str,
    base: str | None = None,
    positions: list[int] | str = "l1",
    dropout: float = 0.0,
    act_fn: str | None = None,
) -> None:
    """Write an adapter of pyreft or pyvene as one of reftnoise, or one of reftnoise as pyreft's.

    A warning names what the other format cannot hold.

    Args:
        source: directory of an adapter of either kind, or hub name of one.
        output: directory for the other kind: new, empty, or with an adapter of that kind, which is
            replaced.
        base: name or path of the base model, which is required; only its config is read.
        positions: positions that a pyreft adapter edits, such as f7+l7.
        dropout: dropout of a pyreft adapter, for further training.
        act_fn: activation function of a pyreft adapter, by transformers' name.
    """
    if base is None:  # no default; jsonargparse makes a required option positional
        raise ValueError("convert: expected --base, the name or path of the base model")
    expect_base(base)
    expect_place(source)
    Positions.parse(positions)
    from ...adapters.pyreft.convert import convert as convert_adapter

    print(
        convert_adapter(
            source, output, base=base, positions=positions, dropout=dropout, act_fn=act_fn
        )
    )


def export(
    adapter: str,
    directory: str,
    to: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    prompts: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write an adapter as plain weights, a LoRA or a control vector, exactly or not at all.

    The export is loaded without reftnoise, and compared with the adapted model: export.json.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        directory: directory for the export.
        to: merged for a checkpoint of transformers, lora for an adapter of PEFT, or
            gguf-control-vector for one of llama.cpp.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        dtype: dtype of the base, such as bfloat16.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        prompts: file of JSON lines with the prompts of the comparison; by default built-in ones.
        overwrite: whether an earlier export in the directory is replaced.
        json: whether the record is printed as JSON.
    """
    expect_target(to)
    expect_free_directory(local_path(directory, "directory"), overwrite=overwrite)
    expect_adapters(adapter, model=model, dtype=dtype)
    if prompts is not None:
        expect_prompts(None, prompts, None)
    from ...inference.export.exporting import export_adapter
    from ...inference.prompts import prompts_of

    record = export_adapter(
        adapter,
        directory,
        str(to),
        model=model,
        dtype=dtype,
        device=device,
        prompts=prompts_of(prompts),
        overwrite=overwrite,
    )
    if json:
        print_json(record)
        return
    proof = record["proof"]
    print_wrapped(
        f"{proof['equal_greedy_answers']} of {proof['prompts']} greedy answers are equal; logits "
        f"differ by at most {proof['largest_logit_difference']:.2g} (rounding: "
        f"{proof['limit_of_rounding']:.2g}, largest logit: {proof['largest_logit']:.3g})."
    )
    for note in record.get("notes", ()):
        print_wrapped(note)
    print(f"The export is in {directory}.")


def verify(
    adapter: str,
    server: str | None = None,
    served_name: str | None = None,
    served_base: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    prompts: str | None = None,
    requests: int = 100,
    longest: int = 512,
    tolerance: float | None = None,
    api_key: str | None = None,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Compare a running server with the adapted model here: tokens and their log-probabilities.

    The exit code is 0 where all are equal within rounding, 1 where some differ, and 2 for mistakes.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        server: address of a server of the OpenAI API, such as http://localhost:8000/v1.
        served_name: name of the model there; by default that of the directory, or the only one.
        served_base: name of the bare base there, which is compared, too; by default what vLLM says.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        dtype: dtype that the server computes in, such as bfloat16.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        prompts: file of JSON lines with prompts; by default built-in ones.
        requests: number of requests.
        longest: number of tokens of the longest prompts, if base and server have so many.
        tolerance: largest difference of log-probabilities, in nats; by default what rounding
            explains.
        api_key: key that the server asks for; by default that of the variable OPENAI_API_KEY.
        quiet: whether nothing but errors is printed.
        json: whether the result is printed as JSON, without progress.
    """
    if server is None:  # no default; jsonargparse makes a required option positional
        raise ValueError("verify: expected --server, the address of a running server")
    api_address(server)
    expect_numbers(requests, longest, tolerance)
    expect_adapters(adapter, model=model, dtype=dtype)
    if prompts is not None:
        expect_prompts(None, prompts, None)
    from ...inference.prompts import prompts_of
    from ...inference.verification.report import print_verification
    from ...inference.verification.verifying import verify_server

    record = verify_server(
        adapter,
        server,
        served_name=served_name,
        served_base=served_base,
        model=model,
        dtype=dtype,
        device=device,
        prompts=prompts_of(prompts),
        requests=requests,
        longest=longest,
        tolerance=tolerance,
        api_key=api_key or os.environ.get("OPENAI_API_KEY"),
        console=progress_console(quiet or json),
    )
    if json:
        print_json(record)
    elif not quiet:
        print_verification(record)
    return 1 if record["differing"] else 0
