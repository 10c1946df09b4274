"""Hutchinson's estimates against Hessians that are written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reftnoise as rn
from reftnoise.analysis.curvature import embedding_hessian_trace

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"}
DRAWS = 200


def adapted() -> rn.ReftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=12, initializer_range=0.5)
    model = LlamaForCausalLM(config)
    noise = {"intervention": "symnoise", "alpha": 5.0}
    return rn.get_reft_model(model, rn.ReftConfig([LOREFT, noise]))


def written_out(reft_model: rn.ReftModel, ids: Tensor, labels: Tensor, prompt: int) -> Tensor:
    """The Hessian of one row's mean loss in its embeddings, from embeddings as inputs."""
    reft_model.eval()
    embeddings = reft_model.get_input_embeddings()(ids[None]).detach()

    def loss(inputs: Tensor) -> Tensor:
        logits = reft_model(inputs_embeds=inputs, prompt_lengths=torch.tensor([prompt])).logits
        return F.cross_entropy(logits[0, :-1], labels[1:])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, embeddings)
    return hessian.reshape(embeddings.numel(), embeddings.numel())


def test_estimates_have_the_mean_and_the_spread_of_the_whole_hessian() -> None:
    reft_model = adapted()
    rows = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 5, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, -100, 4, 5, -100]])
    hessians = [
        written_out(reft_model, rows[0], labels[0], 3),
        written_out(reft_model, rows[1, :4], labels[1, :4], 2),
    ]
    reft_model.train()
    batch = {"input_ids": rows, "attention_mask": mask, "labels": labels}
    estimates = embedding_hessian_trace(reft_model, [batch], draws=DRAWS)
    assert reft_model.training
    assert estimates.shape == (2, DRAWS)
    for row, hessian in zip(estimates, hessians, strict=True):
        trace = hessian.trace().double()
        # The variance of vᵀHv for signs v: twice the squares off the diagonal.
        variance = 2 * (hessian.square().sum() - hessian.diagonal().square().sum()).double()
        assert variance > 0
        assert abs(row.mean() - trace) < 5 * (variance / DRAWS).sqrt()
        assert 0.5 < row.var() / variance < 2


def test_draws_repeat_under_a_seed_and_leave_the_random_state() -> None:
    reft_model = adapted()
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    before = torch.get_rng_state()
    first = embedding_hessian_trace(reft_model, [batch], draws=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, embedding_hessian_trace(reft_model, [batch], draws=2))
    assert not torch.equal(first, embedding_hessian_trace(reft_model, [batch], draws=2, seed=1))


def test_a_row_without_labels_is_named() -> None:
    ids = torch.tensor([[5, 6, 7]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.full_like(ids, -100),
        "prompt_lengths": torch.tensor([3]),
    }
    with pytest.raises(ValueError, match="row 0 of a batch: expected a label"):
        embedding_hessian_trace(adapted(), [batch])
    with pytest.raises(ValueError, match="draws 0"):
        embedding_hessian_trace(adapted(), [batch], draws=0)
