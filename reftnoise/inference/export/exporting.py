"""Write an adapter as what other programs read, and prove that it is the same."""

import contextlib
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..._util.files import json_text, local_path, replace_directory, writing
from ...adapters.directory import AdapterFiles
from ...engine.base.loading import without_bars
from ...interventions.arguments import dtype_name
from ...model import ReftModel
from ...training.run_adapter import adapter_directory
from ..loading import base_for, load_adapted
from ..prompts import asked_prompts
from .formats import (
    adding_control_vector,
    read_lora,
    read_merged,
    write_control_vector,
    write_lora,
    write_merged,
)
from .plan import expect_plain_base
from .proof import (
    GreedyAnswers,
    answers_of,
    largest_difference,
    largest_logit,
    limit_of_float32,
    limit_of_rounding,
    token_prompts,
)
from .target import RECORD, expect_free_directory, expect_target, files_in

_SCRATCH = ".exporting-"
"""The beginning of a scratch folder's name; saves into the same folder remove `.saving-` alone."""
_PACKAGES = ("reftnoise", "torch", "transformers", "peft", "gguf")


def export_adapter(
    adapter: str | Path,
    directory: str | Path,
    to: str = "merged",
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    prompts: Sequence[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    r"""Write an adapter as plain weights, a LoRA or a control vector, exactly or not at all.

    An edit without activation at all tokens, $h \mapsto Mh + v$, goes into the linear layers that
    make or read the hidden states (`"merged"`, `"lora"`), and a constant at a block's output into a
    control vector of llama.cpp (`"gguf-control-vector"`). Products are in float64. The export is
    then loaded without us, by transformers, PEFT or plain hooks, and compared with the adapted
    model: its logits at what the model writes after prompts, and what it writes itself.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        directory: directory for the export, new or empty.
        to: `"merged"`, `"lora"` or `"gguf-control-vector"`.
        model: name or directory of the base, if not that which the adapter was saved with.
        dtype: dtype of the base, as in `load_base`.
        device: device of the proof, as in `load_base`.
        prompts: texts that the proof reads, by default built-in ones.
        overwrite: whether an earlier export in the directory is replaced.

    Returns:
        The record that is next to the export, in `export.json`.

    Raises:
        ValueError: what the adapter does is not exact in that form, and why; or the export differs
            from the adapted model by more than rounding explains. Nothing is written then.
        OSError: there is no such adapter or base.
    """
    expect_target(to)
    place = local_path(directory, "directory").resolve()
    expect_free_directory(place, overwrite=overwrite)
    own = adapter_directory(adapter)
    reft_model, tokenizer = load_adapted(own, model, dtype=dtype, device=device)
    expect_plain_base(reft_model)
    base_name, base_dtype = str(reft_model.config.name_or_path), reft_model.model.dtype
    asked = asked_prompts(own, tokenizer, prompts)
    tokens = token_prompts(tokenizer, reft_model, asked)
    place.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing(place),
        without_bars(),
        tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place.parent) as scratch,
    ):
        new = Path(scratch) / "export"
        new.mkdir()
        # Before the weights change.
        adapted = answers_of(reft_model, tokenizer, tokens)
        with reft_model.disabled():
            bare = answers_of(reft_model, tokenizer, tokens, adapted.written)
        written = _write(reft_model, tokenizer, to, new)
        reft_device = reft_model.device
        del reft_model
        fresh = None if to == "merged" else base_for(own, model, dtype, device)[0]
        with contextlib.ExitStack() as stack:
            exported = _read(to, new, fresh, reft_device, stack)
            answers = answers_of(exported, tokenizer, tokens, adapted.written)
        del exported, fresh
        limit = _limit(adapted, own, tokenizer, tokens, base_dtype, model, device)
        record = {
            "to": to,
            "adapter": {"directory": str(adapter), "identity": AdapterFiles.read(own).identity()},
            "base": base_name,
            "dtype": dtype_name(base_dtype),
            "versions": _versions(),
            **written,
            "proof": _proof(adapted, answers, bare, limit),
        }
        _expect_same(to, record["proof"], base_dtype)
        record["files"] = files_in(new)
        text = json_text(record, indent=2) + "\n"
        (new / RECORD).write_text(text, encoding="utf-8")
        os.chmod(new, 0o777 & ~_umask())
        replace_directory(new, place)
    return record


def _write(reft_model: ReftModel, tokenizer: Any, to: str, directory: Path) -> dict[str, Any]:
    if to == "merged":
        return write_merged(reft_model, tokenizer, directory)
    return (
        write_lora(reft_model, directory)
        if to == "lora"
        else write_control_vector(reft_model, directory)
    )


def _read(to: str, directory: Path, base: Any, device: Any, stack: contextlib.ExitStack) -> Any:
    """The export, loaded without us; a stack holds the hooks of a control vector."""
    if to == "merged":
        return read_merged(directory, device)
    if to == "lora":
        return read_lora(base, directory)
    stack.enter_context(adding_control_vector(base, directory))
    return base


def _limit(
    adapted: GreedyAnswers,
    adapter: Path,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    dtype: torch.dtype,
    model: str | None,
    device: str,
) -> float:
    """The difference that rounding explains; half precision is compared with float32."""
    if dtype.itemsize >= torch.float32.itemsize:
        return limit_of_rounding(adapted, None)
    wide, _ = load_adapted(adapter, model, dtype="float32", device=device)
    return limit_of_rounding(adapted, answers_of(wide, tokenizer, tokens, adapted.written))


def _proof(
    adapted: GreedyAnswers, answers: GreedyAnswers, bare: GreedyAnswers, rounding: float
) -> dict[str, Any]:
    """What the record says of both; a base without the edits is beyond the limit."""
    effect = largest_difference(adapted, bare)
    pairs = list(zip(adapted.written, answers.written, strict=True))
    return {
        "largest_logit_difference": largest_difference(adapted, answers),
        "limit": min(rounding, max(effect / 2, limit_of_float32(adapted))),
        "limit_of_rounding": rounding,
        "largest_effect": effect,
        "largest_logit": largest_logit(adapted),
        "prompts": len(pairs),
        "equal_greedy_answers": sum(mine == theirs for mine, theirs in pairs),
    }


def _expect_same(to: str, proof: dict[str, Any], dtype: torch.dtype) -> None:
    difference, limit = proof["largest_logit_difference"], proof["limit"]
    is_finite = math.isfinite(proof["limit_of_rounding"])
    if not is_finite or not difference <= limit:  # NaN is not
        hint = "; dtype float32 rounds less" if dtype.itemsize < torch.float32.itemsize else ""
        raise ValueError(
            f"{to}: logits of the export differ by {difference:.3g}, where rounding explains "
            f"{proof['limit_of_rounding']:.3g} and the adapter moves them by "
            f"{proof['largest_effect']:.3g}; expected at most {limit:.3g}; nothing was "
            f"written{hint}"
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
