"""Token ids of a prompt, as generation will see them, and of its completion."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from jinja2 import TemplateError

from ..engine.base.peft import virtual_tokens

Messages: TypeAlias = Sequence[Mapping[str, str]]


def tokenize(
    tokenizer: Any, prompt: str | Messages, completion: str, nonstop: bool
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion, with an end-of-text token unless `nonstop`."""
    return tokenize_all(tokenizer, [(prompt, completion)], nonstop)[0]


def tokenize_all(
    tokenizer: Any, pairs: Sequence[tuple[str | Messages, str]], nonstop: bool
) -> list[tuple[list[int], list[int]]]:
    """`tokenize` of each pair, many times faster with a fast tokenizer than one by one."""
    texts = [_text(tokenizer, prompt, completion) for prompt, completion in pairs]
    prompts = _ids(tokenizer, [text.prompt for text in texts], texts)
    wholes = _ids(tokenizer, [text.prompt + text.completion for text in texts], texts)
    rows = zip(texts, prompts, wholes, strict=True)
    return [_prompt_and_target(tokenizer, *row, nonstop) for row in rows]


class _Rendered(NamedTuple):
    """A pair as the tokenizer sees it."""

    prompt: str
    completion: str
    is_plain: bool
    ends_itself: bool


def _text(tokenizer: Any, prompt: str | Messages, completion: str) -> _Rendered:
    if not isinstance(completion, str):
        raise ValueError(f"completion {completion!r}: expected a text")
    if isinstance(prompt, str):
        return _Rendered(prompt, completion, is_plain=True, ends_itself=False)
    if not isinstance(prompt, list):
        raise ValueError(f"prompt {prompt!r}: expected a text")
    answer = {"role": "assistant", "content": completion}
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from None
    if not whole.startswith(text):
        return _Rendered(text, completion, is_plain=False, ends_itself=False)
    rest = whole.removeprefix(text)
    return _Rendered(text, rest, is_plain=False, ends_itself=rest.strip() != completion.strip())


def _ids(tokenizer: Any, texts: Sequence[str], kinds: Sequence[_Rendered]) -> list[list[int]]:
    """Token ids of texts; a chat template writes the special tokens itself."""
    all_ids: list[list[int]] = [[] for _ in texts]
    for is_plain in {kind.is_plain for kind in kinds}:
        indices = [index for index, kind in enumerate(kinds) if kind.is_plain == is_plain]
        # Not verbose: texts that are too long are cut later, with a warning.
        encoded = tokenizer(
            [texts[index] for index in indices], add_special_tokens=is_plain, verbose=False
        )
        for index, ids in zip(indices, encoded["input_ids"], strict=True):
            all_ids[index] = ids
    return all_ids


def _prompt_and_target(
    tokenizer: Any, text: _Rendered, prompt_ids: list[int], whole_ids: list[int], nonstop: bool
) -> tuple[list[int], list[int]]:
    """The ids of the prompt, as generation will see them, and of the completion."""
    if not prompt_ids:
        raise ValueError("the prompt is empty, so there is no position to edit")
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


def smallest_limit(tokenizer: Any, model: Any, max_length: int | None) -> int | None:
    """The least of `max_length` and the tokens that tokenizer and model allow; None without any."""
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
