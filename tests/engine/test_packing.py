"""Rows that hold several documents: each is edited and perturbed as if it were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import tiny_model
from support.tolerance import assert_close

LENGTHS, PROMPTS = (9, 3, 12, 5), (5, 1, 8, 4)
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}


def documents() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    found = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(3, 101, (1, length))
        found.append(
            {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < prompt, -100)}
        )
    return found


def packed(rows: list[list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Rows of documents, all rows of one width, without a mask, as padding-free trainers do."""
    batch: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        for name in ("input_ids", "labels"):
            batch[name].append(torch.cat([document[name] for document in row], 1))
        counts = [torch.arange(document["input_ids"].shape[1])[None] for document in row]
        batch["position_ids"].append(torch.cat(counts, 1))
    return {name: torch.cat(parts) for name, parts in batch.items()} | {"use_cache": False}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize(
    "positions", ["l1", "f1+l1", "f7+l7", "all", "decode", "all+decode", [0, -1], "l2+decode"]
)
def test_documents_of_a_row_are_edited_as_each_alone(architecture: str, positions: Any) -> None:
    config = rn.ReftConfig(LOREFT | {"positions": positions})
    model = rn.get_reft_model(tiny_model(architecture), config)
    first, other = documents(), documents()[::-1]
    found = model(**packed([first, other]))
    alone = [model(**document) for document in first]
    logits = torch.cat([output.logits for output in alone], 1)
    assert_close(found.logits[:1], logits)
    counts = torch.tensor([(d["labels"][:, 1:] != -100).sum() for d in first])
    mean = (torch.stack([output.loss for output in alone]) * counts).sum() / counts.sum()
    # A document's first token has no label, which the document before would have to predict.
    assert_close(found.loss, mean)


def test_without_labels_each_document_is_all_prompt() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT | {"positions": "f1+l2"}))
    batch = packed([documents()])
    del batch["labels"]
    alone = [model(input_ids=document["input_ids"]).logits for document in documents()]
    assert_close(model(**batch).logits, torch.cat(alone, 1))


@pytest.mark.parametrize("name", ["neftune", "gaussian", "symnoise"])
def test_noise_is_scaled_by_each_documents_length(name: str) -> None:
    config = rn.ReftConfig([{"intervention": name, "alpha": 5.0}])
    model = rn.get_reft_model(tiny_model(), config).train()
    seen: list[Tensor] = []
    width = model.config.hidden_size
    hook = model.model.model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    batch = packed([documents()])
    for _ in range(100):
        model(**batch)
    hook.remove()
    clean = model.get_input_embeddings()(batch["input_ids"])
    variance = (torch.stack(seen) - clean).pow(2).mean((0, 1, 3))
    unit = 1 / 3 if name == "neftune" else 1.0
    lengths = torch.tensor([n for n in LENGTHS for _ in range(n)])
    expected = 25.0 * unit / (lengths * width)
    torch.testing.assert_close(variance, expected, rtol=0.15, atol=0.0)


def test_lengths_for_packed_rows_are_refused() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT))
    with pytest.raises(ValueError, match="prompt_lengths of packed rows: each document's prompt"):
        model(**packed([documents()]), prompt_lengths=torch.tensor([3]))


def test_position_ids_of_padded_rows_do_not_pack_them() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT | {"positions": "f2+l1"}))
    (document, *_) = documents()
    plain = model(**document).logits
    counted = torch.arange(LENGTHS[0])[None]
    assert_close(model(**document, position_ids=counted).logits, plain)
    shifted = model(**document, position_ids=counted + 7).logits  # rotary: only distances count
    assert_close(shifted, plain)


@pytest.mark.parametrize(
    "unit",
    [
        {"layer": 1, "intervention": "reftr1", "low_rank_dimension": 1},
        {"layer": 1, "intervention": "bias", "gate": {"type": "condition"}},
    ],
    ids=["reftr1", "condition"],
)
def test_what_reads_a_row_together_takes_one_document(unit: dict[str, Any]) -> None:
    """A mean over several documents would belong to none of them."""
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(unit)).train()
    for placed in model.engine.units:
        if (gate := getattr(placed.unit, "gate", None)) is not None:
            gate.vector.fill_(1.0)
    with pytest.raises(ValueError, match="reads all of a row together, and rows are packed"):
        model(**packed([documents()]))
    for document in documents():
        model(**document)
