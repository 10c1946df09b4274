"""Compare a running server with the adapted model here, and say where they differ."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..._util.progress import progress_of
from ...data.tokenization import prompt_tokens, smallest_limit
from ...evaluation.generation import ends_of
from ...interventions.arguments import dtype_name
from ...training.run_adapter import adapter_directory
from ..loading import by_name, load_adapted
from ..prompts import asked_prompts
from .client import CompletionServer
from .comparison import (
    Exchange,
    OwnReading,
    TokenDifference,
    Verdict,
    compare,
    largest_move,
    limit_of_rounding,
    readings,
)
from .families import PlannedRequest, expect_numbers, families

NEW_TOKENS = 12
"""The number of tokens that are written after each prompt."""
_TEXTS = ("token", "own_token")
"""Fields of a difference that hold a token."""
_AT_ONCE = 4
"""Families of prompts that are asked at once, so that a server's batches are mixed."""


def verify_server(
    adapter: str | Path,
    server: str,
    *,
    served_name: str | None = None,
    served_base: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    prompts: Sequence[str] | None = None,
    requests: int = 100,
    longest: int = 512,
    tolerance: float | None = None,
    api_key: str | None = None,
    console: Any = None,
) -> dict[str, Any]:
    r"""Compare a running server of the OpenAI API with the adapted model here, token by token.

    The server completes prompts greedily: of many lengths, alone and with beginnings that earlier
    prompts, answers and the bare base have left in its caches. One pass here then reads each prompt
    with what the server wrote: each of its tokens has to be the most probable one, and each
    log-probability that it gives the same, $|\log p_{\text{server}} - \log p| \le \tau$. Where it
    gives those of prompts (`echo`), they are compared, too.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        server: address of the API, such as http://localhost:8000/v1.
        served_name: name of the model there, by default that of the directory, or the only one.
        served_base: name of the bare base there, by default what vLLM says.
        model: name or directory of the base here, if not that which the adapter was saved with.
        dtype: dtype that the server computes in, as in `load_base`.
        device: device for the model here, as in `load_base`.
        prompts: texts of prompts, by default built-in ones.
        requests: number of requests.
        longest: number of tokens of the longest prompts, if base and server have so many.
        tolerance: τ in nats; by default what rounding explains: $\max(10^{-3}, 2\cdot10^{-5}
            \max|\text{logit}|)$ in float32, and in half precision also four times the largest
            difference of the model here from itself in float32.
        api_key: key that the server asks for.
        console: console of rich for progress.

    Returns:
        A record: `differing`, the number of requests whose answers differ; `differences`, of each
        of these its first token that differs; what was compared, and by how much it differs.

    Raises:
        ValueError: a mistake in the arguments, or a server that cannot be compared.
        OSError: there is no such adapter, base or server.
    """
    expect_numbers(requests, longest, tolerance)
    own = adapter_directory(adapter)
    reft_model, tokenizer = load_adapted(own, model, dtype=dtype, device=device)
    client = CompletionServer(server, tokenizer, api_key=api_key)
    name, base = _names(client, adapter, served_name, served_base)
    asked = [prompt_tokens(tokenizer, p) for p in asked_prompts(own, tokenizer, prompts)]
    client.look(name, asked[0])
    limits = (longest, _room(smallest_limit(tokenizer, reft_model, None)), _room(client.longest()))
    most = min(limit for limit in limits if limit is not None)
    planned = families(asked, most, requests, with_base=base is not None)
    ends = ends_of(reft_model, tokenizer)
    exchanges = _exchanges(client, name, base, list(planned), ends, most, console)
    if not exchanges:
        raise ValueError(f"server {client.address}: takes texts alone, and no prompt is one")
    with progress_of(console, "passes here", len(exchanges)) as progress:
        mine = readings(reft_model, exchanges, ends, progress=progress)
    asked_of_adapter = [i for i, exchange in enumerate(exchanges) if not exchange.of_base]
    bare = readings(reft_model, [exchanges[i] for i in asked_of_adapter], ends, bare=True)
    limit = tolerance
    if limit is None:
        wide = None
        if reft_model.model.dtype.itemsize < torch.float32.itemsize:
            in_float32, _ = load_adapted(own, model, dtype="float32", device=device)
            wide = readings(in_float32, exchanges, ends)
        limit = limit_of_rounding(mine, wide)

    def verdict(number: int, reading: OwnReading) -> Verdict:
        return compare(number, exchanges[number], reading, limit)

    verdicts = [verdict(number, reading) for number, reading in enumerate(mine)]
    pairs = zip(asked_of_adapter, bare, strict=True)
    is_bare = all(verdict(number, reading).difference is None for number, reading in pairs)
    record = {
        "server": client.address,
        "served_name": name,
        "served_base": base,
        "adapter": str(adapter),
        "base": str(reft_model.config.name_or_path),
        "dtype": dtype_name(reft_model.model.dtype),
        "offers": client.offers(),
        "longest_prompt": most,
        "limit": limit,
        "largest_effect": largest_move([mine[i] for i in asked_of_adapter], bare),
        **_counts(exchanges, verdicts),
    }
    record["notes"] = list(_notes(record, exchanges, verdicts, is_bare=is_bare))
    differences = [one.difference for one in verdicts if one.difference is not None]
    return record | {"differences": [_shown(tokenizer, one) for one in differences]}


def _shown(tokenizer: Any, difference: TokenDifference) -> dict[str, Any]:
    """A difference, with the texts of its tokens."""
    values = asdict(difference)
    return values | {f"{key}_text": tokenizer.decode([values[key]]) for key in _TEXTS}


def _names(
    client: CompletionServer, adapter: str | Path, name: str | None, base: str | None
) -> tuple[str, str | None]:
    """The names of the adapted model and of the bare base on the server, None for no base."""
    if name is None:
        (own,) = by_name(adapter, {})
        name = own if own in client.names else client.names[0]
        if name != own and len(client.names) > 1:
            raise ValueError(
                f"served_name is missing: the server has no {own!r}; expected one of "
                f"{', '.join(client.names)}"
            )
    client.expect_name(name)
    if base is None:  # vLLM names the base of an adapter
        model = next(model for model in client.models if model["id"] == name)
        parent = model.get("parent")
        return name, parent if parent in client.names and parent != name else None
    client.expect_name(base)
    if base == name:
        raise ValueError(f"served_base {base!r}: expected another model than served_name")
    return name, base


def _room(limit: int | None) -> int | None:
    """The longest prompt within a limit that leaves room for an answer and a next turn."""
    return None if limit is None else max(1, limit - NEW_TOKENS)


def _exchanges(
    client: CompletionServer,
    name: str,
    base: str | None,
    planned: Sequence[Sequence[PlannedRequest]],
    ends: Sequence[int],
    longest: int,
    console: Any,
) -> list[Exchange]:
    """The server's answers in the order of requests; several families are asked at once."""

    def ask(family: Sequence[PlannedRequest]) -> list[Exchange]:
        results: list[Exchange] = []
        said: list[list[int]] = []
        for request in family:
            before = said[-1] if request.goes_on and said else []
            prompt = [*before, *request.tokens][:longest]
            if not client.can_send(prompt):
                continue
            asked = base if request.of_base and base is not None else name
            is_echoed = request.echo and client.offers()["prompt_log_probs"]
            completion = client.complete(asked, prompt, NEW_TOKENS, echo=is_echoed)
            tokens = completion.tokens
            # An end token that a server does not show has been written after the others.
            is_hidden = completion.has_stopped and not (tokens and tokens[-1] in ends)
            shared = max((_shared(prompt, other) for other in said), default=0)
            results.append(
                Exchange(prompt, completion, request.of_base, shared, bool(ends) and is_hidden)
            )
            said.append([*prompt, *tokens])
        return results

    exchanges: list[Exchange] = []
    total = sum(map(len, planned))
    with (
        progress_of(console, "answers of the server", total) as progress,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        for results in pool.map(ask, planned):
            exchanges += results
            if progress is not None:
                progress(len(exchanges), total)
    _expect_same_lengths(client, exchanges)
    return exchanges


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens two lists have in common."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def _expect_same_lengths(client: CompletionServer, exchanges: Sequence[Exchange]) -> None:
    for exchange in exchanges:
        read, sent = exchange.completion.prompt_length, len(exchange.prompt)
        if read is not None and read != sent:
            raise ValueError(
                f"server {client.address}: it read {read} tokens of a prompt of {sent}: its "
                "tokenizer is another, or it adds tokens"
            )


def _counts(exchanges: Sequence[Exchange], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "requests": len(exchanges),
        "differing": sum(verdict.difference is not None for verdict in verdicts),
        "largest_difference": max(verdict.largest for verdict in verdicts),
        "compared_tokens": sum(len(exchange.completion.tokens) for exchange in exchanges),
        "compared_log_probs": sum(verdict.compared for verdict in verdicts),
        "near_ties": sum(verdict.near_ties for verdict in verdicts),
    }


def _notes(
    record: dict[str, Any],
    exchanges: Sequence[Exchange],
    verdicts: Sequence[Verdict],
    *,
    is_bare: bool,
) -> Iterator[str]:
    """What a reader should know of the comparison, in sentences."""
    if not record["offers"]["log_probs"]:
        yield "the server gives no log-probabilities: only its tokens are compared"
    elif not record["offers"]["prompt_log_probs"]:
        yield "the server gives no log-probabilities of prompts: only answers are compared"
    if record["largest_effect"] <= 2 * record["limit"]:
        yield (
            f"the adapter moves log-probabilities by {record['largest_effect']:.2g} at most, and "
            f"the limit is {record['limit']:.2g}: a server without it might pass, too"
        )
    differing = [verdict.difference for verdict in verdicts if verdict.difference is not None]
    if not differing:
        return
    if is_bare:
        yield "the server answers as the base does without the adapter"
    alone = [v for v, e in zip(verdicts, exchanges, strict=True) if e.shared == 0]
    if all(one.shared for one in differing) and alone:
        yield (
            "only prompts that begin as earlier ones differ: the server's cache may give them "
            "states that are not theirs"
        )
