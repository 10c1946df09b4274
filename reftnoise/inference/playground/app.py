"""Start a playground."""

from collections.abc import Mapping
from pathlib import Path

from ...training.run_adapter import template_of
from ..loading import BASE, by_name, load_library
from ..ports import expect_free
from ..prompts import default_template
from .asking import TOGETHER, Answerer
from .page import build, launch

_ADDRESSES = ("http://", "https://")


def run_playground(
    source: str,
    others: Mapping[str, str | Path],
    model: str | None = None,
    *,
    host: str = "localhost",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve the page until interrupted.

    Args:
        source: directory or hub name of an adapter, or address of a server.
        others: further adapters of its base, by name.
        model: name or directory of the base; by default the base of the first adapter.
        host: address that the page is served on.
        port: port that the page is served on.
        device: device of the model, as in `load_base`.

    Raises:
        OSError: there is no such adapter, base or server, or the port is taken.
        ValueError: an adapter is damaged or for another base, a name is taken, adapters or a base
            are given together with a server, or there is no such port.
    """
    expect_free(host, port)
    answerer: Answerer
    if source.startswith(_ADDRESSES):
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
        answerer = LocalModel(reft_model, tokenizer, path.name if path.is_dir() else str(path))
        template = template_of(source) or default_template(tokenizer)
    launch(build(answerer, template=template), host=host, port=port)
