"""What the tests of TRL's trainers share: runs, data, and numbers of each row by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed

import reftnoise as rn

trl = pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

MARKS = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
QUESTIONS = rn.load_tiny_examples("train")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def loreft(positions: str = "f1+l1", **entry: Any) -> dict[str, Any]:
    unit = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    return unit | {"positions": positions} | entry


def noise(name: str) -> dict[str, Any]:
    return {"intervention": name, "alpha": 5.0}


def base_model() -> Any:
    return rn.load_tiny_model()[0]


def wrapped(*entries: dict[str, Any], **config: Any) -> tuple[rn.ReftModel, Any]:
    """The embedded model under units, the same at every call, and its tokenizer."""
    base, tokenizer = rn.load_tiny_model()
    set_seed(1)
    return rn.get_reft_model(base, rn.ReftConfig(list(entries) or [loreft()], **config)), tokenizer


def arguments(kind: Any, directory: Path, **settings: Any) -> Any:
    """TRL's own defaults, such as gradient checkpointing, on a CPU in fp32."""
    defaults = {
        "output_dir": str(directory / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 4e-3,
    }
    return kind(**(defaults | settings))


def says(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def conversations(*columns: str) -> Dataset:
    """Questions, answered in emoji (`completion`, `chosen`) and in words (`rejected`)."""
    rows = [
        {
            "prompt": says("user", question.prompt),
            "completion": says("assistant", question.completion),
            "chosen": says("assistant", question.completion),
            "rejected": says("assistant", question.words),
        }
        for question in QUESTIONS
    ]
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def supervised() -> Dataset:
    return conversations("prompt", "completion")


def preferences() -> Dataset:
    return conversations("prompt", "chosen", "rejected")


def first_batch(trainer: Any) -> dict[str, Any]:
    set_seed(0)
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    return batch


def history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def record(module: nn.Module, seen: list[Any]) -> Any:
    """Append what a module puts out; returns the hook's handle."""
    return module.register_forward_hook(lambda _module, _args, output: seen.append(output))


def states(reft_model: rn.ReftModel) -> dict[str, Tensor]:
    """A copy of all weights, the base's too."""
    named = (*reft_model.named_parameters(), *reft_model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def expect_trained(
    reft_model: rn.ReftModel, before: dict[str, Tensor], directory: Path, fresh: Any
) -> None:
    """All that should be trained is, nothing else, and a saved adapter gives the same outputs.

    Without weight decay, an optimizer moves what has a gradient.
    """
    trained = {name for name, p in reft_model.named_parameters() if p.requires_grad}
    assert any(name.startswith("interventions.") for name in trained)
    for name, tensor in states(reft_model).items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    reft_model.eval().save_pretrained(directory / "adapter")
    loaded = rn.ReftModel.from_pretrained(fresh, directory / "adapter")
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reft_model(tokens).logits)


@torch.no_grad()
def row_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of one unpadded row's labels, by the model's own logits."""
    is_reft = isinstance(model, rn.ReftModel)
    given = {"labels": labels[None], "return_logits": True} if is_reft else {}
    logits = model(input_ids=ids[None], **given).logits[0]
    found = F.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return found[labels[1:] != -100]


def rows(batch: dict[str, Tensor], prefix: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a padded batch, without padding, with labels at their completions."""
    names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "completion_mask")]
    for ids, mask, completion in zip(*(batch[name] for name in names), strict=True):
        labels = ids.masked_fill(completion == 0, -100)
        yield ids[mask.bool()], labels[mask.bool()]


def row_sums(model: Any, batch: dict[str, Tensor], prefix: str = "") -> Tensor:
    """Each completion's log-probability, row by row."""
    return torch.stack([row_logps(model, *row).sum() for row in rows(batch, prefix)])
