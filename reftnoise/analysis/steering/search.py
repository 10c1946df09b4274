"""From a file of pairs to a steering vector whose layer and strength are chosen and tested."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..._util.errors import value_errors
from ..._util.files import json_text, local_path, replace_all
from ..._util.progress import progress_of
from ...adapters.location import ADAPTER
from ...config.positions import Positions
from ...config.representations import ReftConfig
from ...data.conversations import rendered
from ...data.templates import fill
from ...data.tokenization import tokenize_all
from ...engine.base.loading import load_base
from ...evaluation.forgetting import answered_pairs, expect_causal, neutral_texts
from ...evaluation.likelihood import TokenPair
from ...model import ReftModel, get_reft_model
from ...training.study.statistics import mean_interval
from .fit import set_vector
from .options import RESULTS, SteerOptions, expect_room
from .pairs import Contrast, PairRow, read_pairs, split_pairs
from .states import whole_tokens
from .sweep import Candidate, NeutralPrompts, Questions, Sweep, fitted_candidates, sweep

if TYPE_CHECKING:
    from rich.console import Console


def search(
    pairs: str | Path,
    model: str,
    output_dir: str | Path,
    options: SteerOptions,
    *,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Fit vectors at all layers, choose one, test it, and write it as an adapter.

    Pairs are split in three, of which one is for each of these. The directory gets `adapter`, and
    `steering.json`, which holds what is returned.

    Args:
        pairs: file of pairs, as of `read_pairs`.
        model: name or directory of the base.
        output_dir: directory for the results.
        options: what is tried, and the budget.
        dtype: dtype of the base, as in `load_base`.
        device: device, as in `load_base`.
        overwrite: whether the results of an earlier search in the directory are replaced.
        console: console for progress.

    Raises:
        OSError: there is no such file or base.
        ValueError: a pair cannot be read, no vector is within the budget, or the directory holds
            something else.
    """
    directory = local_path(output_dir, "output_dir")
    expect_room(directory, overwrite=overwrite)
    rows = read_pairs(pairs)
    base, tokenizer = load_base(model, dtype=dtype, device=device)
    with value_errors(pairs):
        contrasts = tokenized_pairs(tokenizer, rows, options.template)
    split = split_pairs(contrasts, limit=options.limit, seed=options.seed)
    reft_model = get_reft_model(base, vector_config(options, options.layers)).eval()
    expect_causal(reft_model)
    with progress_of(console, "Reading pairs") as progress:
        candidates = fitted_candidates(reft_model, split["fit"], options, progress=progress)
    neutral = neutral_pairs(reft_model, tokenizer, options)
    if len(neutral) < 2:
        raise ValueError("neutral: expected at least two prompts that the base answers")
    settings: Any = {"positions": Positions.parse(options.positions), "rows": options.batch_size}
    with progress_of(console, "Trying vectors") as progress:
        outcome = sweep(
            candidates,
            Questions(reft_model, split["choose"], **settings),
            NeutralPrompts(reft_model, neutral[::2], **settings),
            budget=options.budget,
            sized_by="scales" if options.scales else "sizes",
            progress=progress,
        )
    results = {
        "model": model,
        "pairs": {name: len(part) for name, part in split.items()},
        "neutral_prompts": {"choose": len(neutral[::2]), "test": len(neutral[1::2])},
        "budget": options.budget,
        "positions": options.positions,
        **_described(outcome, candidates),
    }
    # First, so that a search that is killed before its end is one that may be replaced.
    write_results(directory, results)
    _write_adapter(reft_model, outcome, options, directory / ADAPTER)
    loaded = ReftModel.from_pretrained(base, directory / ADAPTER)
    results["test"] = _test(loaded, split["test"], neutral[1::2], settings)
    write_results(directory, results)
    return results


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write `steering.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(directory, {RESULTS: f"{json_text(results, indent=2)}\n".encode()})


def tokenized_pairs(
    tokenizer: Any, rows: Sequence[PairRow], template: str | None = None
) -> list[Contrast]:
    """The tokens of pairs: prompts, or questions in a template with each of their answers.

    An answer after a chat template begins without the blanks that it has in the file.

    Raises:
        ValueError: a pair has no common beginning or no differing part, or the template does not
            fit; the message says where the row is.
    """
    if template is None:
        template = "plain" if tokenizer.chat_template is None else "chat"
    contrasts = []
    for row in rows:
        with value_errors(row.place):
            contrasts.append(_contrast(tokenizer, row, template))
    return contrasts


def _contrast(tokenizer: Any, row: PairRow, template: str) -> Contrast:
    halves = row.positive, row.negative
    if row.question is None:
        prompts = [fill(template, text, row.columns) for text in halves]
        return Contrast.of(*(whole_tokens(tokenizer, prompt) for prompt in prompts))
    prompt = fill(template, row.question, row.columns)
    answers = [text.strip() if template == "chat" else text for text in halves]
    texts = [rendered(tokenizer, prompt, answer) for answer in answers]
    pairs = tokenize_all(tokenizer, texts, nonstop=True)
    return Contrast.of(*([*tokens, *rest] for tokens, rest in pairs))


def neutral_pairs(reft_model: ReftModel, tokenizer: Any, options: SteerOptions) -> list[TokenPair]:
    """The tokens of neutral prompts, and of the base's own greedy answers to them."""
    prompts = neutral_texts(tokenizer, options.neutral).get("prompts", [])[: options.neutral_limit]
    pairs = answered_pairs(
        reft_model,
        tokenizer,
        [text.prompt for text in prompts],
        max_new_tokens=options.neutral_tokens,
        batch_size=options.batch_size,
    )
    return [(prompt, rest[: options.neutral_tokens]) for prompt, rest in pairs]


def vector_config(options: SteerOptions, layers: int | list[int] | str) -> ReftConfig:
    """A vector at each of some layers."""
    return ReftConfig(
        [
            {
                "layer": layers,
                "component": options.component,
                "intervention": "addition",
                "positions": options.positions,
            }
        ]
    )


def _write_adapter(
    reft_model: ReftModel, outcome: Sweep, options: SteerOptions, directory: Path
) -> None:
    """Save the chosen vector times its factor, as an adapter of its layer alone."""
    candidate, scale = outcome.chosen
    chosen = get_reft_model(reft_model.model, vector_config(options, candidate.layer))
    ((_, factors),) = reft_model.adapters[candidate.name].factors()
    set_vector(chosen.engine.units[0], factors.up[0])
    chosen.scale = scale
    chosen.save_pretrained(directory)


def _test(
    loaded: ReftModel, pairs: Sequence[Contrast], neutral: Sequence[TokenPair], settings: Any
) -> dict[str, Any]:
    """What the saved adapter does on what nothing was chosen by."""
    base, steered = Questions(loaded, pairs, **settings).matching([None, "default"])
    (kl,) = NeutralPrompts(loaded, neutral, **settings).divergence(["default"])
    return {
        "base": float(base.mean()),
        "steered": float(steered.mean()),
        "shift": _interval(steered - base),
        "kl": _interval(kl),
    }


def _described(outcome: Sweep, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The choice, its curve, and all that was measured to make it."""
    chosen, scale = outcome.chosen
    shifts, kl = outcome.shifts(chosen.name), outcome.divergence[chosen.name]
    curve = [
        {
            "scale": factor,
            "size": factor * chosen.ratio,
            "shift": _interval(shifts[row]),
            "kl": _interval(kl[row]),
        }
        for row, factor in enumerate(chosen.scales)
    ]
    tried = []
    for candidate in candidates:
        means = outcome.shifts(candidate.name).mean(1).tolist()
        known = outcome.divergence.get(candidate.name)
        costs = [None] * len(means) if known is None else known.mean(1).tolist()
        for factor, shift, cost in zip(candidate.scales, means, costs, strict=True):
            place = {"method": candidate.method, "layer": candidate.layer, "scale": factor}
            size = factor * candidate.ratio
            tried.append(place | {"size": size, "shift": shift, "kl": cost})
    return {
        "chosen": {
            "method": chosen.method,
            "layer": chosen.layer,
            "scale": scale,
            "size": scale * chosen.ratio,
        },
        "base": float(outcome.base.mean()),
        "curve": curve,
        "tried": tried,
    }


def _interval(values: Tensor) -> dict[str, float]:
    """A mean with its bootstrap interval."""
    mean, low, high = mean_interval(values[None].numpy())
    return {"mean": mean, "low": low, "high": high}
