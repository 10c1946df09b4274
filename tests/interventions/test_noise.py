"""Noise on hidden states: its moments, where it falls, and what pairs of it cancel."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import pyvene
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from reftnoise.interventions import (
    BernoulliNoiseIntervention,
    GaussianNoiseIntervention,
    NeftuneIntervention,
    NoiseIntervention,
    SymNoiseIntervention,
)
from reftnoise.interventions.noise import bernoulli_noise, gaussian_noise, uniform_noise
from support.models.architectures import neftune_post_forward_hook
from support.tolerance import assert_close

ONE_SIDED = [NeftuneIntervention, GaussianNoiseIntervention, BernoulliNoiseIntervention]
EVERY = [*ONE_SIDED, SymNoiseIntervention]
# E[x⁴] / E[x²]² of each distribution.
KURTOSIS = {
    NeftuneIntervention: 1.8,
    GaussianNoiseIntervention: 3.0,
    BernoulliNoiseIntervention: 1.0,
    SymNoiseIntervention: 1.0,
}
every_class = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
sides = pytest.mark.parametrize("side", ["left", "right"])


def attention(lengths: list[int], width: int, side: str) -> Tensor:
    """The mask of rows with the given numbers of tokens, padded on one side."""
    columns = torch.arange(width)
    rows = torch.tensor(lengths)[:, None]
    return columns < rows if side == "right" else columns >= width - rows


# -- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_variance", [True, False])
@pytest.mark.parametrize("length", ["attended", "padded"])
@every_class
def test_moments(cls: type[NoiseIntervention], length: str, unit_variance: bool) -> None:
    alpha, batch, width, size = 5.0, 64, 16, 64
    unit = cls(alpha=alpha, length=length, unit_variance=unit_variance)
    noise = unit(torch.zeros(batch, width, size, dtype=torch.float64))
    if cls is SymNoiseIntervention:
        noise = noise[: batch // 2]
    variance = alpha**2 / (width * size) * (1 if unit_variance else 1 / 3)
    count = noise.numel()
    assert abs(noise.mean().item()) < 5 * math.sqrt(variance / count)
    spread = variance * math.sqrt((KURTOSIS[cls] - 1) / count)
    assert abs(noise.square().mean().item() - variance) < 5 * spread + 1e-6 * variance


@pytest.mark.parametrize(
    ("sample", "variance", "largest"),
    [(uniform_noise, 1 / 3, 1.0), (gaussian_noise, 1.0, math.inf), (bernoulli_noise, 1.0, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples(
    sample: Callable[[Tensor, float], Tensor], variance: float, largest: float, dtype: torch.dtype
) -> None:
    bound = 0.25
    like = torch.full((200, 300), 7.0, dtype=dtype)
    noise = sample(like, bound)
    assert (noise.shape, noise.dtype) == (like.shape, dtype)
    assert noise.abs().max() <= bound * largest
    # 16-bit draws lie on a coarse grid, which shifts the moments a little.
    slack = 0.02 if dtype == torch.bfloat16 else 0.0
    expected = variance * bound**2
    deviation = math.sqrt(2 / noise.numel())  # at most: the normal distribution's
    assert abs(noise.double().square().mean().item() / expected - 1) < 5 * deviation + slack
    assert abs(noise.double().mean().item()) / bound < 5 / math.sqrt(noise.numel()) + slack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bernoulli_values_are_the_bound_with_either_sign(dtype: torch.dtype) -> None:
    noise = bernoulli_noise(torch.zeros(100, 100, dtype=dtype), 0.3)
    assert noise.unique().tolist() == torch.tensor([-0.3, 0.3], dtype=dtype).tolist()
    positive = (noise > 0).double().mean().item()
    assert abs(positive - 0.5) < 5 * 0.5 / 100


@every_class
def test_draws_come_from_the_global_generator(cls: type[NoiseIntervention]) -> None:
    unit, hidden = cls(), torch.randn(4, 5, 8)
    torch.manual_seed(3)
    first = unit(hidden)
    second = unit(hidden)
    torch.manual_seed(3)
    assert torch.equal(unit(hidden), first)
    assert not torch.equal(first, second)


@every_class
@pytest.mark.parametrize("length", ["attended", "padded"])
def test_alpha_zero_is_no_noise(cls: type[NoiseIntervention], length: str) -> None:
    hidden = torch.randn(4, 5, 8)
    assert torch.equal(cls(alpha=0, length=length)(hidden), hidden)


@every_class
@pytest.mark.parametrize("length", ["attended", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_hidden_states(
    cls: type[NoiseIntervention], length: str, dtype: torch.dtype
) -> None:
    hidden = torch.randn(4, 5, 8).to(dtype)
    noisy = cls(length=length)(hidden, attended=attention([5, 4, 5, 4], 5, "left"))
    assert noisy.dtype == dtype
    assert not torch.equal(noisy, hidden)


@every_class
def test_evaluation_is_clean(cls: type[NoiseIntervention]) -> None:
    hidden = torch.randn(3, 5, 8)
    assert torch.equal(cls(where="prompt").eval()(hidden), hidden)


@every_class
def test_it_has_no_parameters_and_no_state(cls: type[NoiseIntervention]) -> None:
    unit = cls(embed_dim=8)
    assert not list(unit.parameters())
    assert not unit.state_dict()


@every_class
def test_gradients_pass_through_unchanged(cls: type[NoiseIntervention]) -> None:
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weights = torch.randn(4, 5, 8)
    (cls()(hidden) * weights).sum().backward()
    assert torch.equal(hidden.grad, weights)


# -- which length, which tokens ------------------------------------------------------------------


@sides
@pytest.mark.parametrize("cls", [BernoulliNoiseIntervention, SymNoiseIntervention])
@pytest.mark.parametrize(("unit_variance", "match"), [(True, 1.0), (False, 1 / math.sqrt(3))])
def test_the_scale_of_a_row_counts_its_attended_tokens(
    cls: type[NoiseIntervention], side: str, unit_variance: bool, match: float
) -> None:
    alpha, width, size = 5.0, 9, 8
    lengths = [1, 4, 9, 7] * 2  # SymNoise's second half repeats its first
    attended = attention(lengths, width, side)
    hidden = torch.randn(len(lengths), width, size, dtype=torch.float64)
    noise = cls(alpha=alpha, unit_variance=unit_variance)(hidden, attended=attended) - hidden
    for row, count in enumerate(lengths):
        scale = torch.full((count, size), match * alpha / math.sqrt(count * size)).double()
        torch.testing.assert_close(noise[row][attended[row]].abs(), scale, rtol=1e-6, atol=0)
        assert torch.equal(noise[row][~attended[row]], torch.zeros(width - count, size).double())


@sides
@pytest.mark.parametrize("cls", [NeftuneIntervention, GaussianNoiseIntervention])
def test_the_variance_of_a_row_counts_its_attended_tokens(
    cls: type[NoiseIntervention], side: str
) -> None:
    alpha, width, size = 10.0, 40, 256
    lengths = [10, 40]
    attended = attention(lengths, width, side)
    noise = cls(alpha=alpha)(torch.zeros(2, width, size), attended=attended)
    third = 1 / 3 if cls is NeftuneIntervention else 1.0
    for row, count in enumerate(lengths):
        drawn = noise[row][attended[row]].double()
        expected = third * alpha**2 / (count * size)
        deviation = math.sqrt((KURTOSIS[cls] - 1) / drawn.numel())
        assert abs(drawn.square().mean().item() / expected - 1) < 5 * deviation
        assert not noise[row][~attended[row]].any()


@sides
@every_class
def test_a_row_of_padding_alone_stays_finite_and_clean(
    cls: type[NoiseIntervention], side: str
) -> None:
    hidden = torch.randn(2, 4, 8)
    noisy = cls()(hidden, attended=attention([0, 0], 4, side))
    assert torch.equal(noisy, hidden)


@every_class
def test_padded_counts_and_perturbs_padding(cls: type[NoiseIntervention]) -> None:
    hidden = torch.zeros(4, 6, 8, dtype=torch.float64)
    attended = attention([2, 3, 2, 3], 6, "right")
    noise = cls(length="padded", unit_variance=True)(hidden, attended=attended)
    assert (noise != 0).all()
    if KURTOSIS[cls] == 1:
        bound = torch.full_like(noise, 5 / math.sqrt(6 * 8))
        torch.testing.assert_close(noise.abs(), bound, rtol=1e-6, atol=0)


@sides
@every_class
@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_where_chooses_tokens_but_not_the_scale(
    cls: type[NoiseIntervention], where: str, side: str
) -> None:
    attended = attention([4, 6, 4, 6], 7, side)
    # The first two tokens of each row.
    prompt = attended & (attended.cumsum(1) <= 2)
    hidden = torch.zeros(4, 7, 8)
    torch.manual_seed(5)
    everywhere = cls()(hidden, attended=attended, prompt=prompt)
    torch.manual_seed(5)
    noise = cls(where=where)(hidden, attended=attended, prompt=prompt)
    chosen = prompt if where == "prompt" else attended & ~prompt
    assert torch.equal(noise, everywhere * chosen[..., None])
    assert torch.equal(noise.any(-1), chosen)


@every_class
@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_where_needs_to_know_the_prompt(cls: type[NoiseIntervention], where: str) -> None:
    with pytest.raises(ValueError, match=f"where '{where}' needs to know .* the prompt"):
        cls(where=where)(torch.zeros(2, 3, 4))


# -- transformers' NEFTune -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [5, 5.0, 0.1, 15.0])
@pytest.mark.parametrize(("batch", "width", "size"), [(3, 7, 33), (1, 1, 8), (4, 64, 16)])
def test_padded_neftune_is_that_of_transformers_bit_for_bit(
    dtype: torch.dtype, alpha: float, batch: int, width: int, size: int
) -> None:
    embedding = nn.Embedding(50, size, dtype=dtype)
    tokens = torch.randint(0, 50, (batch, width))
    clean = embedding(tokens)
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(11)
    expected = embedding(tokens)
    torch.manual_seed(11)
    noisy = NeftuneIntervention(alpha=alpha, length="padded")(clean)
    assert not torch.equal(expected, clean)
    assert torch.equal(noisy, expected)


# -- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["attended", "padded"])
def test_the_second_half_is_the_negative_of_the_first(length: str) -> None:
    attended = attention([3, 5] * 2, 6, "left")
    noise = SymNoiseIntervention(length=length).delta(torch.randn(4, 6, 8), attended)
    assert torch.equal(noise[2:], -noise[:2])
    assert noise[:2].any()


def test_an_odd_batch_is_no_batch_of_pairs() -> None:
    with pytest.raises(ValueError, match="SymNoise got 3 rows: expected every example twice"):
        SymNoiseIntervention()(torch.zeros(3, 4, 8))


def pair_of_quadratics(
    x: Tensor, matrix: Tensor, slope: Tensor, unit: NoiseIntervention
) -> tuple[Tensor, Tensor]:
    """f(x) = xᵀAx + bᵀx + 3 per token: clean, and averaged over the pair x + δ, x − δ."""

    def quadratic(y: Tensor) -> Tensor:
        return torch.einsum("...i,ij,...j->...", y, matrix, y) + y @ slope + 3.0

    plus, minus = quadratic(unit(torch.cat([x, x]))).chunk(2)
    return quadratic(x), (plus + minus) / 2


@pytest.mark.parametrize(("unit_variance", "match"), [(True, 1.0), (False, 1 / 3)])
def test_a_diagonal_quadratic_gains_exactly_half_sigma_squared_trace(
    unit_variance: bool, match: float
) -> None:
    alpha, width, size = 5.0, 6, 8
    x = torch.randn(2, width, size, dtype=torch.float64, requires_grad=True)
    diagonal = torch.randn(size, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(size, dtype=torch.float64, requires_grad=True)
    unit = SymNoiseIntervention(alpha=alpha, unit_variance=unit_variance)
    clean, mean = pair_of_quadratics(x, diagonal.diag(), slope, unit)

    variance = match * alpha**2 / (width * size)
    hessian_trace = 2 * diagonal.sum()
    torch.testing.assert_close(mean, clean + variance * hessian_trace / 2, rtol=0, atol=1e-5)

    mean.sum().backward()
    tokens = x.detach().flatten(0, 1)
    closed = {
        x: (2 * diagonal * x + slope).detach(),
        diagonal: (tokens.square() + variance).sum(0),
        slope: tokens.sum(0),
    }
    for leaf, gradient in closed.items():
        torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-5)


def test_a_full_quadratic_gains_half_sigma_squared_trace_on_average() -> None:
    alpha, tokens, size = 5.0, 4096, 4
    x = torch.randn(1, tokens, size, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(size, size, dtype=torch.float64)
    slope = torch.randn(size, dtype=torch.float64)
    clean, mean = pair_of_quadratics(x, matrix, slope, SymNoiseIntervention(alpha=alpha))

    variance = alpha**2 / (tokens * size)
    gain = (mean - clean).mean().item()
    # What is left of δᵀAδ is Σ_{i<j} (a_ij + a_ji) δ_i δ_j, with independent signs.
    mixed = (matrix + matrix.T).triu(1).square().sum().sqrt().item()
    assert abs(gain - variance * matrix.trace().item()) < 5 * variance * mixed / math.sqrt(tokens)

    mean.sum().backward()  # the gradient with respect to x is exact for any A
    expected = (x @ (matrix + matrix.T) + slope).detach()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)


# -- inside pyvene -------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("form", ["intervention", "intervention_type"])
@pytest.mark.parametrize("component", ["block_output", "model.embed_tokens.output"])
def test_pyvene_perturbs_in_training_mode_alone(
    cls: type[NoiseIntervention], form: str, component: str, tiny_llama: LlamaForCausalLM
) -> None:
    tokens = torch.randint(3, 101, (2, 6)).repeat(2, 1)
    clean = tiny_llama(input_ids=tokens).logits.detach()
    given = cls if form == "intervention_type" else cls()
    entry = {"layer": 0, "component": component, form: given}
    model = pyvene.IntervenableModel(entry, model=tiny_llama)
    (unit,) = model.interventions.values()
    assert isinstance(unit, cls)

    unit.train()  # pyvene's train() and eval() do not reach its interventions
    _, noisy = model({"input_ids": tokens})
    assert (noisy.logits - clean).abs().max() > 1e-3
    unit.eval()
    _, quiet = model({"input_ids": tokens})
    assert_close(quiet.logits, clean)


@every_class
def test_pyvene_adds_the_units_own_noise(
    cls: type[NoiseIntervention], tiny_llama: LlamaForCausalLM
) -> None:
    tokens = torch.randint(3, 101, (4, 6))
    embedded = tiny_llama.model.embed_tokens(tokens).detach()
    torch.manual_seed(7)
    expected = tiny_llama(inputs_embeds=cls()(embedded)).logits
    entry = {"component": "model.embed_tokens.output", "intervention": cls()}
    model = pyvene.IntervenableModel(entry, model=tiny_llama)
    torch.manual_seed(7)
    _, output = model({"input_ids": tokens})
    assert_close(output.logits, expected)


# -- what bad input gets -------------------------------------------------------------------------


@every_class
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("alpha", [-1, -0.5, math.nan, math.inf, "5", None], "a finite number of at least 0"),
        ("length", ["batch", None, 7], "'attended' or 'padded'"),
        ("where", ["everywhere", None], "'all', 'prompt' or 'completion'"),
    ],
    ids=["alpha", "length", "where"],
)
def test_values_out_of_range(
    cls: type[NoiseIntervention], name: str, values: list[Any], expected: str
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name} {value!r}: expected {expected}"):
            cls(**{name: value})


@every_class
@pytest.mark.parametrize(
    ("argument", "near"), [("alhpa", "alpha"), ("lenght", "length"), ("unit_varaince", "unit_var")]
)
def test_a_mistyped_argument_names_the_nearest(
    cls: type[NoiseIntervention], argument: str, near: str
) -> None:
    message = f"{cls.__name__} got an unknown argument '{argument}'; did you mean '{near}"
    with pytest.raises(TypeError, match=message):
        cls(**{argument: 1})


@every_class
def test_an_argument_like_no_other_lists_what_there_is(cls: type[NoiseIntervention]) -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'noise_leve'.*alpha, length"):
        cls(noise_leve=5.0)  # type: ignore[call-arg]
