"""What a model writes after prompts, in batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config.decoding import greedy_by_default
from ..data.conversations import Messages
from ..data.tokenization import padding_token, prompt_tokens, smallest_limit
from .likelihood import Progress, TokenPair, without_beginnings


def generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    generation: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What a model writes after each prompt: the new tokens' text, up to an end of text.

    Prompts of about equal length share a batch. They are padded on the left, whatever the
    tokenizer's padding side. A prompt that leaves no room for the new tokens loses its beginning.
    `generation` holds further arguments of `generate`, which is greedy by default.

    Raises:
        ValueError: `max_new_tokens` is below 1 or as long as the model's context.
    """
    limit = smallest_limit(tokenizer, model, None)
    if max_new_tokens < 1 or (limit is not None and limit - max_new_tokens < 2):
        room = "" if limit is None else f" and at most {limit - 2}, for a context of {limit}"
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1{room}")
    pairs: list[TokenPair] = [(prompt_tokens(tokenizer, prompt), []) for prompt in prompts]
    left = None if limit is None else limit - max_new_tokens
    tokens = [prompt for prompt, _ in without_beginnings(tokenizer, pairs, left)]
    ends = ends_of(model, tokenizer)
    settings = greedy_by_default(generation or {}) | ending_arguments(model, tokenizer)
    texts = [""] * len(prompts)
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(len(tokens[index]) for index in indices)
        # A row's own token pads it: a repetition penalty counts the padding's token as written,
        # and where that is the end-of-text token, a row would end later for being padded.
        ids = torch.tensor([tokens[n][:1] * (width - len(tokens[n])) + tokens[n] for n in indices])
        lengths = torch.tensor([len(tokens[n]) for n in indices])
        mask = torch.arange(width) >= width - lengths[:, None]
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            max_new_tokens=max_new_tokens,
            **settings,
        )
        for index, new in zip(indices, written[:, width:].tolist(), strict=True):
            end = next((column for column, token in enumerate(new) if token in ends), None)
            texts[index] = tokenizer.decode(
                new[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return texts


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training adds, and the base's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return sorted(set(ends))


def ending_arguments(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of `generate`: the tokens that end a text, and the one that pads after them."""
    ends = ends_of(model, tokenizer)
    return {"pad_token_id": padding_token(tokenizer), "eos_token_id": ends or None}
