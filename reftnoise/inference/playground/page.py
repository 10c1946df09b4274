"""The page: a prompt, an answer of each model, and the settings."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from ...config.decoding import Decoding
from ...training.run_adapter import template_of
from ..loading import BASE, by_name, load_library
from .asking import NO_NOISE, TOGETHER, Answer, Answerer, AnswerRequest
from .norms import ABOUT, STYLE, draw

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ValueError(f"the playground needs {error.name}: pip install 'reftnoise[web]'") from None

TEMPLATES = ("chat", "plain", "alpaca")
OWN = ""
"""The choice of the template that each adapter was trained with."""
POSITIONS = {
    "first": "the prompt's first tokens",
    "last": "the prompt's last tokens",
    "all": "the whole prompt",
    "indices": "chosen tokens",
    "decode": "the answer",
}
"""The fields of `Positions`, as the page calls them."""


def run_playground(
    source: str,
    others: Mapping[str, str | Path],
    model: str | None,
    *,
    host: str,
    port: int,
    device: str,
) -> None:
    """Serve the page of an adapter, or of a server with an address, until interrupted.

    Raises:
        OSError, ValueError: as in `load_library`, there is no such server, or adapters or a base
            are given with a server.
    """
    answerer: Answerer
    if source.startswith(("http://", "https://")):
        if others or model is not None:
            raise ValueError("--others and --model: a server has its own adapters and base")
        from .server import Server

        answerer, template = Server(source), "chat"
    else:
        adapters = by_name(source, others)
        for name in (BASE, TOGETHER):
            if name in adapters:
                raise ValueError(f"adapter name {name!r}: the page has an answer of this name")
        from .local import LocalModel

        reft_model, tokenizer = load_library(adapters, model, device=device)
        path = Path(reft_model.model.config.name_or_path)
        templates = {n: own for n, path in adapters.items() if (own := template_of(path))}
        title = path.name if path.is_dir() else str(path)
        answerer = LocalModel(reft_model, tokenizer, title, templates)
        of_answers = set(answerer.templates.values())
        template = OWN if len(of_answers) > 1 else of_answers.pop()
    launch(build(answerer, template=template), host=host, port=port)


def build(answerer: Answerer, *, template: str, max_new_tokens: int = 64) -> gr.Blocks:
    """A page that asks a model or a server, with the template and number of tokens set at first."""
    with gr.Blocks(title="reftnoise", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## reftnoise · {answerer.title}")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Prompt", max_lines=12, scale=6, autofocus=True, elem_id="prompt",
                placeholder="Enter to ask, Shift+Enter for a new line.",
            )  # fmt: skip
            with gr.Column(scale=1, min_width=120):
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
        controls = _controls(answerer, template, max_new_tokens)
        scales, texts, norms = _columns(answerer, controls["names"])
        if norms:
            gr.Markdown(ABOUT)

        def answer(prompt: str, *values: Any) -> Iterator[list[Any]]:
            settings = dict(zip(controls, values, strict=False))
            scale_of = dict(zip(answerer.scaled, values[len(controls) :], strict=True))
            with _errors_shown():
                request = _request(answerer, prompt, settings, scale_of)
                for answers in answerer.answers(request):
                    written = [answers.get(name, Answer()).text for name in answerer.names]
                    drawn = [draw(answers[n]) if n in answers else "" for n in answerer.names]
                    yield [*written, *drawn] if norms else written

        inputs = [prompt, *controls.values(), *scales]
        events = [ask.click, prompt.submit]
        running = [
            event(answer, inputs, [*texts, *norms], show_progress="hidden") for event in events
        ]
        stop.click(None, cancels=running)
    return page


def launch(page: gr.Blocks, *, host: str, port: int, waits: bool = True) -> str:
    """Serve a page, and return its address.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no CDN's
    _, address, _ = page.launch(
        server_name=host, server_port=port, theme=theme, css=STYLE, prevent_thread_lock=True,
        quiet=True, footer_links=[], share=False, ssr_mode=False,
    )  # fmt: skip
    if waits:
        print(f"The page is at {address}; Ctrl-C ends it.", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return address


def _controls(answerer: Answerer, template: str, max_new_tokens: int) -> dict[str, Any]:
    """The settings that all answers share, by name."""
    controls: dict[str, Any] = {}
    names = list(answerer.names)
    controls["names"] = gr.CheckboxGroup(names, value=names, label="Models", elem_id="names")
    with gr.Accordion("Template and sampling", open=False), gr.Row():
        info, choices = "Or any text with {prompt} in it.", list[Any](TEMPLATES)
        if template == OWN:
            of_answers = [f"{name}: {answerer.templates[name]}" for name in answerer.names]
            info, choices = (
                f"{info} {'; '.join(of_answers)}.",
                [("each adapter's own", OWN), *choices],
            )
        elif template not in TEMPLATES:
            choices.append(template)
        controls["template"] = gr.Dropdown(
            choices, value=template, label="Template", allow_custom_value=True, elem_id="template",
            info=info,
        )  # fmt: skip
        controls["max_new_tokens"] = gr.Slider(
            1, 1024, max_new_tokens, step=1, label="New tokens", elem_id="new-tokens"
        )
        controls["temperature"] = gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0 is greedy."
        )
        controls["seed"] = gr.Number(0, label="Seed", precision=0)
    if answerer.layers:
        with gr.Accordion("Where adapters edit", open=True, elem_id="where"), gr.Row():
            layers = list(answerer.layers)
            controls["layers"] = gr.CheckboxGroup(
                layers, value=layers, label="Layers", elem_id="layers"
            )
            named = [(POSITIONS[name], name) for name in answerer.positions]
            controls["positions"] = gr.CheckboxGroup(
                named, value=[name for _, name in named], label="Positions", elem_id="positions"
            )
    if answerer.noises:
        with gr.Accordion("Noise on the prompt's embeddings", open=False), gr.Row():
            noises = [NO_NOISE, *answerer.noises]
            controls["noise"] = gr.Radio(noises, value=NO_NOISE, label="Noise", elem_id="noise")
            controls["alpha"] = gr.Slider(0, 30, 5, step=0.5, label="α of α/√(Ld)")
    return controls


def _columns(answerer: Answerer, names: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """A column for each answer, with its scale, text and norms."""
    scales, texts, norms, columns = [], [], [], []
    with gr.Row():
        for number, name in enumerate(answerer.names):
            with gr.Column(min_width=250, visible=name in names.value) as column:
                columns.append(column)
                texts.append(gr.Textbox(label=name, lines=5, elem_id=f"answer-{number}"))
                if name in answerer.scaled:
                    elem_id = f"scale-{number}"
                    slider = gr.Slider(-2, 2, 1, step=0.05, label="Scale of edits", elem_id=elem_id)
                    scales.append(slider)
                if answerer.layers:
                    norms.append(gr.HTML(elem_id=f"norms-{number}"))

    def show(chosen: list[str]) -> list[Any]:
        return [gr.Column(visible=name in chosen) for name in answerer.names]

    names.change(show, names, columns, show_progress="hidden")
    return scales, texts, norms


def _request(
    answerer: Answerer, prompt: str, settings: dict[str, Any], scales: dict[str, float]
) -> AnswerRequest:
    whole = {"layers": answerer.layers, "positions": answerer.positions}
    where = {
        name: None if len(settings[name]) == len(values) else settings[name]
        for name, values in whole.items()
        if name in settings
    }
    return AnswerRequest(
        prompt=prompt,
        names=[name for name in answerer.names if name in settings["names"]],
        scales=scales,
        decoding=Decoding(
            template=settings["template"] or None,
            max_new_tokens=int(settings["max_new_tokens"]),
            temperature=float(settings["temperature"]),
            seed=int(settings["seed"] or 0),
        ),
        noise=settings.get("noise", NO_NOISE),
        alpha=settings.get("alpha", 0.0),
        **where,
    )


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show errors on the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None  # read as HTML
