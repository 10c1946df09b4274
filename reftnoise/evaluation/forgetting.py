r"""How far an adapter moves its base on texts that it was not trained for.

At each token of such a text, base and adapted model predict the next one, as $p_\text{base}$ and
$p_\text{adapted}$. Two numbers say how far these are apart, in nats per token:

- the divergence $\mathrm{KL}(p_\text{base} \,\|\, p_\text{adapted}) = \sum_v p_\text{base}(v)
  \log \frac{p_\text{base}(v)}{p_\text{adapted}(v)}$, which is 0 where nothing has changed;
- the change of the loss, $\log p_\text{base}(t) - \log p_\text{adapted}(t)$ of the text's token t,
  which is above 0 where the text has become less likely.

Both are means over the tokens that follow a text's prompt, since edits at a prompt act on the
tokens after it. Where a text is a prompt alone, the base's own greedy answer follows it. Where it
is a passage, its first quarter is the prompt.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .._util.files import local_path
from ..data.conversations import Messages, rendered
from ..data.files import json_lines_of
from ..data.templates import fill
from ..data.tokenization import smallest_limit, tokenize_all
from ..engine.base.peft import inner_model
from ..engine.base.sites import is_encoder_decoder, trained_modules
from ..model import ReftModel
from .generation import generated
from .likelihood import Progress, TokenPair, next_token_log_probs, without_beginnings
from .scoring import evaluating

NEUTRAL = Path(__file__).parent / "neutral.jsonl"
"""Prompts and passages in plain English, about nothing in particular, which the library ships."""
MAX_NEW_TOKENS = 32
"""Longest answer of the base that a prompt is followed by."""

Kind: TypeAlias = Literal["prompts", "texts"]


@dataclass(frozen=True)
class NeutralText:
    """A prompt and what follows it; None stands for the base's own answer."""

    prompt: str | Messages
    completion: str | None = None


@dataclass(frozen=True)
class Forgetting:
    """How far an adapted model is from its base on texts, each a mean over the text's tokens.

    Args:
        kl: KL(base ‖ adapted) of each text, in nats per token.
        base_loss: loss of the base on each text, in nats per token.
        adapted_loss: loss of the adapted model on each text, in nats per token.
        tokens: number of tokens that each text was measured at.
    """

    kl: list[float]
    base_loss: list[float]
    adapted_loss: list[float]
    tokens: list[int]

    @property
    def loss_change(self) -> list[float]:
        """How much the loss of each text has risen, in nats per token."""
        return [a - b for a, b in zip(self.adapted_loss, self.base_loss, strict=True)]


def forgetting(
    reft_model: ReftModel,
    tokenizer: Any,
    texts: Sequence[NeutralText | str | Messages],
    *,
    base: PreTrainedModel | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Forgetting:
    """KL to the base, and losses of both, on texts that have nothing to do with the training.

    The adapted model is the one of the block around the call: `reft_model.using(adapter=…,
    scale=…)` chooses another adapter or strength.

    Args:
        reft_model: model whose edits are compared with its bare base.
        tokenizer: tokenizer of the base.
        texts: prompts with completions; a prompt alone, also a text or a conversation by itself, is
            followed by what the base writes greedily.
        base: base with its original weights, of which the model trained modules of its own; by
            default the model without its edits.
        max_new_tokens: greatest number of tokens that the base writes.
        batch_size: number of texts per forward pass.
        progress: function that is called with the numbers of texts done and of all texts.

    Raises:
        ValueError: there are no texts, one is empty, the base is no causal language model, or the
            model holds trained modules of the base, and there is no other base.
    """
    pairs = answered_pairs(
        reft_model,
        tokenizer,
        texts,
        base=base,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    lengths = [len(completion) for _, completion in pairs]
    kl, base_loss, adapted_loss = ([0.0] * len(pairs) for _ in range(3))
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [pairs[index] for index in indices]
        with _unadapted(reft_model, base) as bare:
            before = next_token_log_probs(bare, batch, dtype=torch.float32)
        with evaluating(reft_model):
            adapted = next_token_log_probs(reft_model, batch, dtype=torch.float32)
        for index, p, q in zip(indices, before, adapted, strict=True):
            target = torch.tensor(pairs[index][1], device=p.device)[:, None]
            kl[index] = float(token_kl(p, q).mean())
            base_loss[index] = -float(p.gather(1, target).mean())
            adapted_loss[index] = -float(q.gather(1, target).mean())
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return Forgetting(kl, base_loss, adapted_loss, lengths)


@contextlib.contextmanager
def _unadapted(reft_model: ReftModel, base: PreTrainedModel | None) -> Iterator[Any]:
    """The model to compare with, in evaluation mode: the base, or the model without its edits."""
    with contextlib.nullcontext() if base is not None else reft_model.disabled():
        bare = reft_model if base is None else base
        with evaluating(bare):
            yield bare


def answered_pairs(
    reft_model: ReftModel,
    tokenizer: Any,
    texts: Sequence[NeutralText | str | Messages],
    *,
    base: PreTrainedModel | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
) -> list[TokenPair]:
    """The tokens of each prompt and of what follows it, as of `written_by_base`.

    A prompt that is too long for the context loses its beginning.
    """
    continued = written_by_base(
        reft_model,
        tokenizer,
        texts,
        base=base,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    whole = [rendered(tokenizer, text.prompt, text.completion or "") for text in continued]
    pairs = tokenize_all(tokenizer, whole, nonstop=True)
    return without_beginnings(tokenizer, pairs, smallest_limit(tokenizer, reft_model, None))


def holds_trained_base(reft_model: ReftModel) -> bool:
    """Whether modules of the base itself are trained, so that no base without them is left."""
    return bool(trained_modules(reft_model.model, reft_model.reft_config.modules_to_save))


def expect_causal(reft_model: ReftModel) -> None:
    """Raise a ValueError unless the base is a causal language model."""
    base = inner_model(reft_model.model)
    if is_encoder_decoder(base) or not reft_model.can_generate():
        raise ValueError(f"forgetting needs a causal language model, got {type(base).__name__}")


def token_kl(
    log_p: Float[Tensor, "tokens vocabulary"], log_q: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    r"""$\mathrm{KL}(p \,\|\, q) = \sum_v p_v (\log p_v - \log q_v)$ at each token, in nats.

    Rounding may take it below 0 where p and q are equal: it is then 0.
    """
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return kl.sum(-1).clamp(min=0)


def written_by_base(
    reft_model: ReftModel,
    tokenizer: Any,
    texts: Sequence[NeutralText | str | Messages],
    *,
    base: PreTrainedModel | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
) -> list[NeutralText]:
    """Texts in which each prompt alone is followed by the base's own greedy answer.

    Those that the base answers with nothing are left out: no token follows them. Arguments and
    errors are those of `forgetting`.
    """
    expect_causal(reft_model)
    if base is None and holds_trained_base(reft_model):
        raise ValueError(
            "base: expected one with its original weights, since modules_to_save "
            f"{reft_model.reft_config.modules_to_save} has trained those of the model's own"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    rows = [text if isinstance(text, NeutralText) else NeutralText(text) for text in texts]
    alone = [text.prompt for text in rows if text.completion is None]
    with _unadapted(reft_model, base) as bare:
        answers = iter(
            generated(bare, tokenizer, alone, max_new_tokens=max_new_tokens, batch_size=batch_size)
        )
    continued = [
        NeutralText(text.prompt, next(answers) if text.completion is None else text.completion)
        for text in rows
    ]
    continued = [text for text in continued if text.completion]
    if not continued:
        raise ValueError("no texts: expected at least one that something follows")
    return continued


def neutral_texts(tokenizer: Any, path: str | Path | None = None) -> dict[Kind, list[NeutralText]]:
    """The library's neutral prompts and passages, or those of a file of JSON lines.

    A line has a `prompt`, perhaps with a `completion`, or a `text`, of which the first quarter is
    the prompt. Prompts are in the tokenizer's chat template, if it has one; passages are as they
    are.

    Raises:
        OSError: there is no such file.
        ValueError: a line has neither, or something else than a text.
    """
    template = "plain" if tokenizer.chat_template is None else "chat"
    texts: dict[Kind, list[NeutralText]] = {"prompts": [], "texts": []}
    for row in read_neutral(path):
        if "text" in row:
            texts["texts"].append(_parted(row["text"]))
        else:
            prompt = fill(template, row["prompt"], {})
            texts["prompts"].append(NeutralText(prompt, row.get("completion")))
    return {kind: rows for kind, rows in texts.items() if rows}


def read_neutral(path: str | Path | None = None) -> list[dict[str, str]]:
    """The rows of such a file, checked; errors as in `neutral_texts`."""
    place = NEUTRAL if path is None else local_path(path, "forgetting")
    try:
        rows = [_checked(line, row) for line, row in json_lines_of(place)]
    except ValueError as error:
        raise ValueError(f"{place}, {error}") from None
    if not rows:
        raise ValueError(f"{place}: no texts in it")
    return rows


def _checked(line: str, row: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in ("text", "prompt", "completion") if row.get(name) is not None]
    if names not in (["text"], ["prompt"], ["prompt", "completion"]):
        raise ValueError(
            f"{line}: expected a text, or a prompt, perhaps with a completion; got "
            f"{', '.join(names or row) or 'nothing'}"
        )
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{line}: {name} {row[name]!r}: expected a text")
    if names == ["text"] and len(row["text"].split()) < 2:
        raise ValueError(f"{line}: text {row['text']!r}: expected at least two words")
    return {name: row[name] for name in names}


def _parted(text: str) -> NeutralText:
    """A passage whose first quarter of words, at least one, is the prompt."""
    words = list(re.finditer(r"\S+", text))
    end = words[max(1, len(words) // 4) - 1].end()
    return NeutralText(text[:end], text[end:])
