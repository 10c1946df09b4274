"""Token ids of a prompt and its completion: the prompt's are those that generation will see."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Messages: TypeAlias = Sequence[Mapping[str, str]]


def tokenize(
    tokenizer: Any, prompt: str | Messages, completion: str, nonstop: bool
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion; the prompt's are those that generation will see."""
    if not isinstance(completion, str):
        raise ValueError(f"completion {completion!r}: expected a text")
    if not isinstance(prompt, str | list):
        raise ValueError(f"prompt {prompt!r}: expected a text")
    ends_itself = False
    is_plain = isinstance(prompt, str)
    if isinstance(prompt, str):
        text = prompt
    else:
        answer = {"role": "assistant", "content": completion}
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
        if whole.startswith(text):
            ends_itself = whole.removeprefix(text).strip() != completion.strip()
            completion = whole.removeprefix(text)
    # A chat template writes the special tokens itself.
    prompt_ids: list[int] = tokenizer(text, add_special_tokens=is_plain)["input_ids"]
    if not prompt_ids:
        raise ValueError("the prompt is empty, so there is no position to edit")
    joint: list[int] = tokenizer(text + completion, add_special_tokens=is_plain)["input_ids"]
    if joint[: len(prompt_ids)] == prompt_ids:
        target_ids = joint[len(prompt_ids) :]
    else:  # a token would reach across the boundary
        target_ids = _tokenize_alone(tokenizer, completion)
    end = tokenizer.eos_token_id
    if not (nonstop or ends_itself or end is None or target_ids[-1:] == [end]):
        target_ids = [*target_ids, end]
    if not target_ids:
        raise ValueError("the completion is empty, so there is nothing to learn")
    return prompt_ids, target_ids


def _tokenize_alone(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in the middle of another: no token that stands for a space before it."""
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    joint: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    if joint[: len(line)] == line:
        return joint[len(line) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def truncate(
    tokenizer: Any, prompt_ids: list[int], target_ids: list[int], max_length: int
) -> tuple[list[int], list[int]]:
    """Drop the prompt's beginning, but not a beginning-of-text token; then the completion's end."""
    starts = len(prompt_ids) > 1 and prompt_ids[0] == tokenizer.bos_token_id
    start, rest = prompt_ids[:starts], prompt_ids[starts:]
    target_ids = target_ids[: max_length - len(start) - 1]
    return start + rest[len(start) + len(target_ids) - max_length :], target_ids


def smallest_limit(tokenizer: Any, model: Any, max_length: int | None) -> int | None:
    """The smallest of what is asked for, what the tokenizer and what the model's context allow."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limits = [
        max_length,
        getattr(tokenizer, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
    ]
    smallest = min((limit for limit in limits if limit is not None), default=None)
    if smallest is not None and smallest < 3:
        raise ValueError(f"max_length {smallest}: expected at least 3 tokens")
    return smallest
