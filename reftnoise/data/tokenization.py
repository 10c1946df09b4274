"""Token ids of a prompt, as generation will see them, and of its completion."""

from collections.abc import Sequence
from typing import Any

from ..engine.base.peft import virtual_tokens
from .conversations import Messages, Rendered, prompt_text


def prompt_tokens(tokenizer: Any, prompt: str | Messages) -> list[int]:
    """The tokens of a prompt, as in training.

    Raises:
        ValueError: the prompt is empty, or the chat template cannot render it.
    """
    text = prompt if isinstance(prompt, str) else prompt_text(tokenizer, prompt)
    (ids,) = _ids(tokenizer, [text], [isinstance(prompt, str)])
    return _not_empty(ids)


def tokenize_all(
    tokenizer: Any, texts: Sequence[Rendered], nonstop: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions, with an end-of-text token unless `nonstop`.

    A fast tokenizer takes many at once, many times faster than one by one.
    """
    is_plain = [text.is_plain for text in texts]
    prompts = _ids(tokenizer, [text.prompt for text in texts], is_plain)
    wholes = _ids(tokenizer, [text.prompt + text.completion for text in texts], is_plain)
    rows = zip(texts, prompts, wholes, strict=True)
    return [_prompt_and_target(tokenizer, *row, nonstop) for row in rows]


def _ids(tokenizer: Any, texts: Sequence[str], are_plain: Sequence[bool]) -> list[list[int]]:
    """Token ids of texts; a chat template writes the special tokens itself."""
    expect_tokenizer(tokenizer)
    all_ids: list[list[int]] = [[] for _ in texts]
    for is_plain in set(are_plain):
        indices = [index for index, plain in enumerate(are_plain) if plain == is_plain]
        # Not verbose: texts that are too long are cut later, with a warning.
        encoded = tokenizer(
            [texts[index] for index in indices], add_special_tokens=is_plain, verbose=False
        )
        for index, ids in zip(indices, encoded["input_ids"], strict=True):
            all_ids[index] = ids
    return all_ids


def _prompt_and_target(
    tokenizer: Any, text: Rendered, prompt_ids: list[int], whole_ids: list[int], nonstop: bool
) -> tuple[list[int], list[int]]:
    """The ids of the prompt, as generation will see them, and of the completion."""
    _not_empty(prompt_ids)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        target_ids = whole_ids[len(prompt_ids) :]
    else:  # a token would reach across the boundary
        target_ids = _tokenize_alone(tokenizer, text.completion)
    end = tokenizer.eos_token_id
    if not (nonstop or text.ends_itself or end is None or target_ids[-1:] == [end]):
        target_ids = [*target_ids, end]
    if not target_ids:
        raise ValueError("the completion is empty, so there is nothing to learn")
    return prompt_ids, target_ids


def _not_empty(prompt_ids: list[int]) -> list[int]:
    if not prompt_ids:
        raise ValueError("the prompt is empty, so there is no position to edit")
    return prompt_ids


def _tokenize_alone(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text inside another, without the token of a space before it."""
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    joint: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    if joint[: len(line)] == line:
        return joint[len(line) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def truncate(
    tokenizer: Any, prompt_ids: list[int], target_ids: list[int], max_length: int | None
) -> tuple[list[int], list[int]]:
    """Drop the prompt's beginning, but not a beginning-of-text token, then the completion's end.

    Nothing is dropped where the two are short enough.
    """
    if max_length is None or len(prompt_ids) + len(target_ids) <= max_length:
        return prompt_ids, target_ids
    starts = len(prompt_ids) > 1 and prompt_ids[0] == tokenizer.bos_token_id
    start, rest = prompt_ids[:starts], prompt_ids[starts:]
    target_ids = target_ids[: max_length - len(start) - 1]
    return start + rest[len(start) + len(target_ids) - max_length :], target_ids


def expect_tokenizer(tokenizer: Any) -> None:
    """Raise a ValueError for a model in the place of a tokenizer."""
    if hasattr(tokenizer, "named_parameters"):
        raise ValueError(
            f"tokenizer: expected a tokenizer, got a model ({type(tokenizer).__name__}); are model "
            "and tokenizer swapped?"
        )


def smallest_limit(tokenizer: Any, model: Any, max_length: int | None) -> int | None:
    """The least of `max_length` and the tokens that tokenizer and model allow; None without any."""
    expect_tokenizer(tokenizer)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limits = [
        max_length,
        getattr(tokenizer, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
    ]
    smallest = min((limit for limit in limits if limit is not None), default=None)
    base = getattr(model, "model", None)
    if smallest is not None and base is not None:
        smallest -= virtual_tokens(base)  # which take part of the context
    if smallest is not None and smallest < 3:
        raise ValueError(f"max_length {smallest}: expected at least 3 tokens")
    return smallest


def padding_token(tokenizer: Any) -> int:
    """The id to pad with: masks tell it from tokens, so a tokenizer need not have one."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)
