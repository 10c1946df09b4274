"""Start a playground."""

from collections.abc import Mapping
from pathlib import Path

from ...training.run_adapter import template_of
from ..loading import by_name, load_library
from ..ports import expect_free
from .asking import BASE, TOGETHER, Answerer
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
        source: an adapter's directory or hub name, or a server's address.
        others: further adapters of its base, by name.
        model: the base; by default that of the first adapter.
        host: of the page.
        port: likewise.
        device: as in `load_base`.

    Raises:
        OSError: no such adapter, base or server, or the port is taken.
        ValueError: an adapter is damaged, or for another base; a name that is taken; adapters
            or a base beside a server; or no port.
    """
    expect_free(host, port)
    answerer: Answerer
    if source.startswith(_ADDRESSES):
        if others or model is not None:
            raise ValueError("--others and --model are of adapters here: a server has its own")
        from .server import Server

        answerer, template = Server(source), "chat"
    else:
        adapters = by_name(source, others)
        for name in (BASE, TOGETHER):
            if name in adapters:
                raise ValueError(f"adapter name {name!r}: the page has an answer of that name")
        from .local import LocalModel

        reft_model, tokenizer = load_library(adapters, model, device=device)
        path = Path(reft_model.model.config.name_or_path)
        answerer = LocalModel(reft_model, tokenizer, path.name if path.is_dir() else str(path))
        template = template_of(source) or ("chat" if tokenizer.chat_template else "plain")
    launch(build(answerer, template=template), host=host, port=port)
