"""The vocabulary of a base: rows of its embeddings, and of its head, which grow with added tokens.

No download of a base has rows that were added, so an adapter tells how many rows its base had, and
values of some: the last, where tokens are added, and a few before. Rows that the config's
`token_rows` names are among its weights, and are put back where it is loaded.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.base.peft import inner_model
from .directory import AdapterFiles, called
from .fingerprint import differs, is_readable

PREFIX = "token_rows."
"""How the names of saved rows begin in a file of weights."""

LAST, BEFORE = 128, 8
"""Rows of a vocabulary of which values are kept: the last, and some before."""


def sample_vocabulary(model: PreTrainedModel, trained: Collection[str]) -> dict[str, Any] | None:
    """The number of embeddings, and two values of some rows; None for a base without embeddings.

    Args:
        model: a base, in PEFT's wrapper or not.
        trained: ends of names of the parameters of the base that an adapter holds.
    """
    tables = _tables(model)
    if not tables:
        return None
    size = len(tables["input"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sample: dict[str, Any] = {"size": size}
    for kind, table in tables.items():
        name = names.get(id(table), "")
        is_saved = any(saved.endswith(f".{name}") for saved in trained)
        is_replaced = ".original_module." in name  # by a copy that PEFT trains
        if is_readable(table) and not (table.requires_grad or is_saved or is_replaced):
            values = _values(table, _sampled(size)).flatten().tolist()
            sample[kind] = " ".join(f"{value:.4g}" for value in values)
    return sample


def expect_vocabulary(adapter: AdapterFiles, model: PreTrainedModel) -> None:
    """Check that a base has as many rows as an adapter's base had, or can have them.

    A base grows to twice its size where the adapter has rows for it.

    Raises:
        ValueError: the base has fewer.
    """
    sample, tables = adapter.base.get("vocabulary"), _tables(model)
    if sample is None or not tables:
        return
    theirs, own = _size(adapter), len(tables["input"])
    if theirs > (own if adapter.config.token_rows is None else 2 * own):
        raise ValueError(
            f"{adapter.config_path}: the adapter's base ({adapter.base_name}) has {theirs} "
            f"embeddings, the given model ({called(_name(model))}) {own}: call "
            f"model.resize_token_embeddings({theirs}), with the tokenizer that the adapter was "
            "trained with"
        )


def other_rows(adapter: AdapterFiles, model: PreTrainedModel) -> str | None:
    """The tokens whose rows differ from the adapter's base, for a message; None where none does."""
    sample = adapter.base.get("vocabulary")
    if sample is None:
        return None
    size = _size(adapter)
    differing: set[int] = set()
    for kind, table in _tables(model).items():
        rows = [row for row in _sampled(size) if row < len(table)]
        restored = {*(adapter.config.token_rows or ()), *_trained_by_peft(adapter, kind)}
        if kind not in sample or not is_readable(table):
            continue
        try:
            theirs = torch.tensor([float(value) for value in sample[kind].split()])
            theirs = theirs.view(len(_sampled(size)), 2)
        except (ValueError, AttributeError, RuntimeError):
            raise ValueError(f"{adapter.config_path}: damaged vocabulary") from None
        mine = _values(table, rows)
        different = differs(mine, theirs[: len(rows)]).any(1).tolist()
        differing |= {
            row for row, is_other in zip(rows, different, strict=True) if is_other
        } - restored
    return _ids(sorted(differing)) if differing else None


def _trained_by_peft(adapter: AdapterFiles, kind: str) -> set[int]:
    """Tokens of which PEFT has rows of its own."""
    section = adapter.config.peft or {}
    tokens = section.get("token_indices") or section.get("trainable_token_indices") or ()
    if isinstance(tokens, Mapping):  # by name of the module
        tokens = [token for named in tokens.values() for token in named]
    return set(tokens) if kind == "input" else set()


# -- rows that are saved -------------------------------------------------------------------------


def expect_tokens(model: PreTrainedModel, tokens: Sequence[int] | None) -> None:
    """Raise a ValueError for `token_rows` that the base does not have."""
    if tokens is None:
        return
    tables = _tables(model)
    if not tables:
        raise ValueError(f"token_rows: {type(inner_model(model)).__name__} has no token embeddings")
    size = len(tables["input"])
    if beyond := [token for token in tokens if token >= size]:
        raise ValueError(
            f"token_rows {_ids(beyond)}: the model has {size} embeddings; call "
            "model.resize_token_embeddings(len(tokenizer)) first"
        )


def saved_rows(model: PreTrainedModel, tokens: Sequence[int] | None) -> dict[str, Tensor]:
    """The rows of tokens by name, as an adapter's file has them.

    Raises:
        ValueError: rows that the base does not have, or has not in memory as they are.
    """
    if tokens is None:
        return {}
    expect_tokens(model, tokens)
    tables = _tables(model)
    for kind, table in tables.items():
        if not is_readable(table):
            raise ValueError(
                f"token_rows: the {kind} embeddings are quantised, spread over processes or not in "
                "memory: expected plain weights"
            )
    rows = torch.tensor(tokens)
    return {
        f"{PREFIX}{kind}": table.detach()[rows.to(table.device)].cpu()
        for kind, table in tables.items()
    }


@contextlib.contextmanager
def room_for(adapter: AdapterFiles, model: PreTrainedModel) -> Iterator[None]:
    """Resize a base that has fewer embeddings than the base of an adapter that saved rows.

    Where the block, which loads the adapter, ends in an error, the base has its own size again.
    """
    tables, base = _tables(model), inner_model(model)
    if adapter.config.token_rows is None or not tables or "vocabulary" not in adapter.base:
        yield
        return
    own = len(tables["input"])
    if _size(adapter) > own:
        base.resize_token_embeddings(_size(adapter), mean_resizing=False)
    try:
        yield
    except BaseException:
        if _size(adapter) > own:
            base.resize_token_embeddings(own)
        raise


def put_rows(adapter: AdapterFiles, rows: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Put the rows that an adapter has saved into a base that has room for them.

    Raises:
        ValueError: the file lacks them, or they do not fit.
    """
    for table, index, row in _placed(adapter, rows, model):
        with torch.no_grad():
            table[index] = row


def expect_rows(adapter: AdapterFiles, rows: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    """Raise a ValueError for a base whose rows are not those that an adapter has saved."""
    for table, index, row in _placed(adapter, rows, model):
        if not is_readable(table) or differs(table.detach()[index], row).any():
            raise ValueError(
                f"{adapter.config_path}: has token_rows {_ids(adapter.config.token_rows or ())}, "
                "which the base has not: ReftModel.from_pretrained puts them into it"
            )


def _placed(
    adapter: AdapterFiles, rows: Mapping[str, Tensor], model: PreTrainedModel
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each table, the saved rows' places in it, and the rows, once all of them fit."""
    tokens, tables = adapter.config.token_rows, _tables(model)
    if tokens is None:
        return []
    expect_tokens(model, tokens)
    placed = []
    for kind, table in tables.items():
        saved, shape = rows.get(f"{PREFIX}{kind}"), (len(tokens), *table.shape[1:])
        if saved is None or saved.shape != shape:
            got = "is not in it" if saved is None else f"has shape {tuple(saved.shape)}"
            raise ValueError(f"{adapter.weights_path}: {PREFIX}{kind} {got}, expected {shape}")
        index = torch.tensor(tokens, device=table.device)
        placed.append((table, index, saved.to(table)))
    return placed


def _tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """Embeddings, an untied head and its bias: a row for each token."""
    base = inner_model(model)
    tables: dict[str, Tensor] = {}
    for kind, getter in (("input", "get_input_embeddings"), ("output", "get_output_embeddings")):
        try:
            part = _original(getattr(base, getter)())
        except (NotImplementedError, AttributeError):  # the second: no model of transformers
            continue
        if kind == "input" and not hasattr(part, "num_embeddings"):  # of images or sound
            return {}
        for name, table in ((kind, "weight"), (f"{kind}_bias", "bias")):
            tensor = getattr(part, table, None)
            is_tied = any(tensor is other for other in tables.values())
            if isinstance(tensor, Tensor) and tensor.dim() and not is_tied:
                tables[name] = tensor
    size = len(tables["input"]) if "input" in tables else None
    return {name: table for name, table in tables.items() if size and len(table) == size}


def _original(part: Any) -> Any:
    """The module that PEFT's layers or wrappers are around."""
    while (
        inside := getattr(part, "original_module", getattr(part, "base_layer", None))
    ) is not None:
        part = inside
    return part


def _size(adapter: AdapterFiles) -> int:
    sample = adapter.base["vocabulary"]
    size = sample.get("size") if isinstance(sample, dict) else None
    if type(size) is not int or size < 1:
        raise ValueError(f"{adapter.config_path}: damaged vocabulary")
    return size


def _sampled(size: int) -> list[int]:
    first = max(0, size - LAST)
    step = max(1, first // BEFORE)
    return [*range(0, first, step)[:BEFORE], *range(first, size)]


def _values(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Two values of each row, or a bias twice."""
    flat = table.detach().view(len(table), -1)
    index = torch.tensor(rows, dtype=torch.long, device=table.device)
    width = flat.shape[1]
    columns = torch.stack([index % width, (index + max(1, width // 2)) % width], dim=1)
    return flat[index[:, None], columns].float().cpu()


def _ids(tokens: Iterable[int]) -> str:
    first = list(tokens)
    return f"{first[:4]}" if len(first) <= 4 else f"{first[:4]} and {len(first) - 4} more"


def _name(model: PreTrainedModel) -> str:
    return str(getattr(getattr(inner_model(model), "config", None), "name_or_path", ""))
