"""Start a playground."""

from collections.abc import Mapping
from pathlib import Path

from ...training.run_adapter import template_of
from ..loading import BASE, by_name, load_library
from ..prompts import default_template
from .asking import TOGETHER, Answerer
from .page import build, launch

_ADDRESSES = ("http://", "https://")


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
        OSError, ValueError: as in `load_library`, there is no such server, or a server is to have
            adapters or a base.
    """
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
