"""Commands that answer prompts: generate, chat, serve, playground.

Heavy imports are inside the functions: `--help` and mistakes do not wait for torch.
"""

from ...config.decoding import Decoding
from ..checks import expect_adapters, expect_free, expect_prompts, expect_template
from ..printing import print_json, progress_console


def generate(
    adapter: str,
    decoding: Decoding,
    prompt: str | None = None,
    input: str | None = None,  # noqa: A002  # the option's name
    output: str | None = None,
    column: str = "prompt",
    compare: bool = False,
    model: str | None = None,
    device: str = "auto",
    batch_size: int = 16,
    json: bool = False,
) -> None:
    """Answer prompts with an adapted model and, if asked, with its base.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        decoding: template and sampling.
        prompt: text to answer.
        input: file of JSON lines with further prompts.
        output: file for the answers as JSON lines; by default they are printed.
        column: key of the prompts in input.
        compare: whether the base without its adapter answers, too.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        batch_size: number of prompts per forward pass.
        json: whether the answers are printed as JSON.
    """
    expect_adapters(adapter, model=model)
    expect_template(decoding)
    expect_prompts(prompt, input, output)
    from rich.console import Console

    from ...inference.prompts import answer_prompts

    rows = answer_prompts(
        adapter,
        prompts=[] if prompt is None else [prompt],
        input=input,
        output=output,
        column=column,
        compare=compare,
        model=model,
        device=device,
        decoding=decoding,
        batch_size=batch_size,
        console=None if json else Console(highlight=False),
        progress_console=progress_console(json),
    )
    if json:
        print_json(rows)


def chat(adapter: str, decoding: Decoding, model: str | None = None, device: str = "auto") -> None:
    """Talk with an adapted model; /off, /on and /scale 0.5 turn its edits down and up.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        decoding: template and sampling.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_adapters(adapter, model=model)
    expect_template(decoding)
    from ...inference.chat import chat as start_chat

    start_chat(adapter, model=model, device=device, decoding=decoding)


def serve(
    adapter: str,
    others: dict[str, str] | None = None,
    model: str | None = None,
    host: str = "localhost",
    port: int = 8000,
    dtype: str | None = None,
    device: str = "auto",
) -> None:
    """Serve adapters of one base by the OpenAI API, each as a model, on transformers' server.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter; its last part is
            the name that requests use.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        host: address that the server listens on.
        port: port that the server listens on.
        dtype: dtype of the base, such as bfloat16.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_adapters(adapter, others, model, dtype)
    expect_free(host, port)
    from ...inference.loading import BASE, by_name, load_library
    from ...inference.server import start_server

    adapters = by_name(adapter, others or {})
    if BASE in adapters:
        raise ValueError(f"adapter name {BASE!r}: this is the name of the model without adapters")
    loaded = load_library(adapters, model, dtype=dtype, device=device)
    names = ", ".join([BASE, *adapters])
    print(f"{names} are served at http://{host}:{port}/v1; Ctrl-C ends it.", flush=True)
    start_server(*loaded, host=host, port=port)


def playground(
    source: str,
    others: dict[str, str] | None = None,
    model: str | None = None,
    host: str = "localhost",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Open a page in the browser: base and adapters side by side, scaled, in parts, and noised.

    Args:
        source: directory of a run or of an adapter, or hub name of an adapter; or address of a
            running server of the OpenAI API, such as http://localhost:8000/v1.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        model: directory, GGUF file or name of the base, if not that which the adapter was saved
            with.
        host: address that the page is served on.
        port: port that the page is served on.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_free(host, port)
    if "://" not in source:
        expect_adapters(source, others, model)
    from ...inference.playground.page import run_playground

    run_playground(source, others or {}, model, host=host, port=port, device=device)
