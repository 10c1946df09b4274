"""What is measured of an adapter, against edits, subspaces and logits that are known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.analysis.inspection import (
    edit_norms,
    logit_lens,
    noise_losses,
    subspace_cosine,
    subspaces,
)
from support.adapters import with_rows
from support.models.architectures import ARCHITECTURES, tiny_model
from support.models.tiny_models import model_of

LOBIREFT = {"intervention": "lobireft", "low_rank_dimension": 2}
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
PROMPT = "a few tokens"


def cosines_of(a: rn.ReftModel, b: rn.ReftModel) -> dict[str, float]:
    return subspace_cosine(subspaces(a), subspaces(b))


class Letters:
    """A tokenizer of letters: ids from 3 on."""

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[3 + ord(letter) % 90 for letter in text]], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


LETTERS = Letters()


def moving(model: Any, **entry: Any) -> rn.ReftModel:
    """LoBiReFT, whose edit Rᵀb has the length of b whatever it edits: here 5."""
    reft_model = rn.get_reft_model(model, rn.ReftConfig([LOBIREFT | entry]))
    for unit in reft_model.interventions.values():
        unit.learned_source.data = torch.tensor([3.0, 4.0])
    return reft_model.eval()


def layer_outputs(model: Any, edit: Tensor | None = None) -> list[Tensor]:
    """Each layer's output for PROMPT, with `edit` added to layer 0's at the last token."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        if edit is not None and not found:
            output = output.clone()
            output[:, -1] += edit
        found.append(output[0])
        return output

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        model(**LETTERS(PROMPT))
    for hook in hooks:
        hook.remove()
    return found


# -- edit norms ------------------------------------------------------------------------------------


def test_norms_are_those_of_a_known_edit(tiny_llama: Any) -> None:
    bare = layer_outputs(tiny_llama)
    found = edit_norms(moving(tiny_llama, layer=[1], positions="f2+l1"), LETTERS, PROMPT)
    expected = torch.zeros(len(PROMPT))
    expected[[0, 1, -1]] = 5 / bare[1].norm(dim=-1)[[0, 1, -1]]
    assert found.sites == ["model.layers.1.output"]
    assert len(found.tokens) == len(PROMPT)
    torch.testing.assert_close(found.norms, expected[None])


def test_a_site_sees_the_edits_before_it(tiny_llama: Any) -> None:
    reft_model = moving(tiny_llama, layer=[0, 1], positions="l1")
    unit = next(iter(reft_model.interventions.values()))
    edit = (unit.learned_source @ unit.rotate_layer()).detach()
    outputs = layer_outputs(tiny_llama, edit)
    found = edit_norms(reft_model, LETTERS, PROMPT)
    assert found.norms[0, -1] == pytest.approx(5 / float((outputs[0][-1] - edit).norm()))
    assert found.norms[1, -1] == pytest.approx(5 / float(outputs[1][-1].norm()))


@pytest.mark.parametrize("component", ["block_input", "mlp_output", "attention_output"])
def test_units_that_share_a_site_are_one_row(tiny_llama: Any, component: str) -> None:
    entries = [LOREFT | {"component": component, "positions": p} for p in ("f1", "l1")]
    reft_model = rn.get_reft_model(
        tiny_llama, rn.ReftConfig([*entries, {"intervention": "symnoise"}])
    )
    found = edit_norms(reft_model.train(), LETTERS, PROMPT)
    assert found.norms.shape == (3, len(PROMPT))
    assert (found.norms > 0).sum() == 6
    assert reft_model.training
    assert reft_model.interventions.training
    assert not tiny_llama.model.layers[0]._forward_hooks
    assert "_apply" not in vars(reft_model.engine)


def test_models_with_two_sequences_and_prompts_without_tokens(tiny_llama: Any) -> None:
    t5 = rn.get_reft_model(model_of("t5"), rn.ReftConfig(LOREFT))
    with pytest.raises(ValueError, match="expected a model with one sequence"):
        edit_norms(t5, LETTERS, PROMPT)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal language model"):
        logit_lens(t5, LETTERS, PROMPT)
    with pytest.raises(ValueError, match="prompt '': it has no tokens"):
        edit_norms(moving(tiny_llama, layer=[0]), LETTERS, "")


def test_a_conversation_goes_through_the_chat_template() -> None:
    model, tokenizer = rn.load_tiny_model()
    reft_model = rn.get_reft_model(model, rn.ReftConfig(LOREFT))
    chat = [{"role": "user", "content": "Where does a bear live?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = edit_norms(reft_model, tokenizer, chat)
    assert found.tokens == [tokenizer.decode([token]) for token in tokens]


# -- subspaces -------------------------------------------------------------------------------------


def test_equal_orthogonal_contained_and_tilted_subspaces(tiny_llama: Any) -> None:
    axes = torch.eye(32)
    first = with_rows(tiny_llama, axes[:4])
    site = "model.layers.0.output"
    mixed = torch.randn(4, 4) @ axes[:4]
    for rows, expected in [(mixed, 1.0), (axes[4:8], 0.0), (axes[:2], 1.0), (axes[2:6], 0.5)]:
        cosines = cosines_of(first, with_rows(tiny_llama, rows))
        assert cosines == {site: pytest.approx(expected, abs=1e-6)}
    angle = 0.3
    tilted = math.cos(angle) * axes[:4] + math.sin(angle) * axes[4:8]
    assert cosines_of(first, with_rows(tiny_llama, tilted))[site] == pytest.approx(
        math.cos(angle) ** 2
    )


def test_random_subspaces_meet_as_the_docstring_says() -> None:
    means = [
        subspace_cosine(*({"": torch.linalg.qr(torch.randn(64, r))[0].mT} for r in (3, 5)))[""]
        for _ in range(300)
    ]
    assert sum(means) / len(means) == pytest.approx(5 / 64, rel=0.05)


def test_free_projections_count_by_their_row_space(tiny_llama: Any) -> None:
    rows = torch.randn(3, 32)
    first, second = with_rows(tiny_llama, rows, "noreft"), with_rows(tiny_llama, rows, "loreft")
    assert list(cosines_of(first, second).values()) == [pytest.approx(1.0)]


def test_sites_are_matched_by_name_and_number(tiny_llama: Any) -> None:
    untied = LOREFT | {"positions": "f1+l1", "tied": False}
    both = rn.get_reft_model(tiny_llama, rn.ReftConfig([untied, {"intervention": "neftune"}]))
    assert list(subspaces(both)) == [f"model.layers.{n}.output{end}" for end in ("", "#1")
                                     for n in range(3)]  # fmt: skip
    one = rn.get_reft_model(tiny_llama, rn.ReftConfig(LOREFT | {"layer": [1]}))
    assert list(cosines_of(both, one)) == ["model.layers.1.output"]
    bias = rn.get_reft_model(tiny_llama, rn.ReftConfig({"layer": [1], "intervention": "bias"}))
    reason = r"no common site: .*model.layers.1.output, .* no subspaces"
    with pytest.raises(ValueError, match=reason):
        cosines_of(one, bias)


# -- logit lens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_layer_predicts_what_the_model_predicts(architecture: str) -> None:
    model = tiny_model(architecture)
    reft_model = rn.get_reft_model(model, rn.ReftConfig(LOREFT)).eval()
    rows = logit_lens(reft_model, LETTERS, PROMPT, top=3)
    assert [row.layer for row in rows] == [0, 1, 2]
    with torch.no_grad():
        adapted = reft_model(**LETTERS(PROMPT)).logits[0, -1].softmax(-1).topk(3)
        base = model(**LETTERS(PROMPT)).logits[0, -1].softmax(-1).topk(3)
    for guesses, expected in [(rows[-1].base, base), (rows[-1].adapted, adapted)]:
        assert [int(guess.token) for guess in guesses] == expected.indices.tolist()
        if architecture != "gemma2":  # it caps its logits after the head
            probabilities = [guess.probability for guess in guesses]
            assert probabilities == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_inner_layer_is_read_through_norm_and_head(tiny_llama: Any) -> None:
    reft_model = moving(tiny_llama, layer=[1], positions="l1")
    rows = logit_lens(reft_model, LETTERS, PROMPT, top=101)
    hidden = layer_outputs(tiny_llama)[1][-1]
    with torch.no_grad():
        logits = tiny_llama.lm_head(tiny_llama.model.norm(hidden))
    found = {int(guess.token): guess.probability for guess in rows[1].base}
    expected = dict(enumerate(logits.softmax(-1).tolist()))
    assert found == pytest.approx(expected, rel=1e-4)
    assert rows[0].base == rows[0].adapted
    assert rows[1].base != rows[1].adapted


def test_a_base_without_final_norm(tiny_llama: Any) -> None:
    tiny_llama.model.norm = torch.nn.Identity()
    row = logit_lens(moving(tiny_llama, layer=[0]), LETTERS, PROMPT, top=1)[0]
    with torch.no_grad():
        logits = tiny_llama.lm_head(layer_outputs(tiny_llama)[0][-1])
    assert int(row.base[0].token) == int(logits.argmax())


# -- noise -----------------------------------------------------------------------------------------


def batch() -> dict[str, Tensor]:
    encoded = LETTERS(PROMPT) | {"labels": LETTERS(PROMPT)["input_ids"].clone()}
    encoded["labels"][:, :4] = -100
    return encoded


@pytest.mark.parametrize("noise", ["neftune", "symnoise"])
def test_losses_are_those_of_evaluation_and_training(tiny_llama: Any, noise: str) -> None:
    units = [LOREFT | {"dropout": 0.0}, {"intervention": noise, "alpha": 20.0}]
    reft_model = rn.get_reft_model(tiny_llama, rn.ReftConfig(units)).eval()
    found = noise_losses(reft_model, [batch()], draws=3, seed=7)
    with torch.no_grad():
        assert found.clean == pytest.approx(float(reft_model(**batch()).loss), rel=1e-5)
        torch.manual_seed(7)
        reft_model.train()
        expected = [float(reft_model(**batch()).loss) for _ in range(3)]
    assert found.noisy == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 3


def test_dropout_is_off_and_everything_comes_back(tiny_llama: Any) -> None:
    units = [LOREFT | {"dropout": 0.5}, {"intervention": "gaussian", "alpha": 0.0}]
    reft_model = rn.get_reft_model(tiny_llama, rn.ReftConfig(units)).train()
    state = torch.random.get_rng_state()
    found = noise_losses(reft_model, [batch(), batch()], draws=2)
    assert found.noisy == pytest.approx([found.clean] * 2, rel=1e-6)
    assert all(module.training for module in reft_model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_losses_weigh_tokens_alike(tiny_llama: Any) -> None:
    units = [LOREFT, {"intervention": "neftune"}]
    reft_model = rn.get_reft_model(tiny_llama, rn.ReftConfig(units)).eval()
    short = {name: values[:, :6] for name, values in batch().items()}
    losses = [noise_losses(reft_model, [part], draws=1).clean for part in (batch(), short)]
    tokens = [int((part["labels"][:, 1:] != -100).sum()) for part in (batch(), short)]
    both = noise_losses(reft_model, [batch(), short], draws=1).clean
    assert both == pytest.approx(
        sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens), rel=1e-5
    )


def test_without_noise_there_is_nothing_to_compare(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="the config has no noise"):
        noise_losses(rn.get_reft_model(tiny_llama, rn.ReftConfig(LOREFT)), [batch()])
