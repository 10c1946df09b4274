"""Orthonormal rows: the factorisation, its stability in training, and its caches."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reftnoise.interventions import LowRankRotation, orthonormal_rows, rotation, shared_bases

WIDTH, RANK = 32, 4

quick = settings(max_examples=50, deadline=None)


@st.composite
def matrices(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian [rank, width] matrices with rank ≤ width, of moderate condition."""
    width = draw(st.integers(1, 24))
    rank = draw(st.integers(1, min(width, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    assume(torch.linalg.cond(raw) < 100)
    return raw.to(dtype)


def gap(rows: Tensor) -> float:
    """The largest element of |RRᵀ − I|, in float64."""
    rows = rows.detach().double()
    return (rows @ rows.mT - torch.eye(rows.shape[-2])).abs().max().item()


def positive_qr(raw: Tensor) -> Tensor:
    """torch's QR of Xᵀ with the signs that make its diagonal positive."""
    q, r = torch.linalg.qr(raw.mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


# -- the factorisation ---------------------------------------------------------------------------


@quick
@given(matrices())
def test_rows_are_orthonormal(raw: Tensor) -> None:
    assert gap(orthonormal_rows(raw)) <= 1e-6


@quick
@given(matrices(torch.float64))
def test_the_span_is_kept(raw: Tensor) -> None:
    rows = orthonormal_rows(raw)
    torch.testing.assert_close(rows.T @ rows, torch.linalg.pinv(raw) @ raw, rtol=0, atol=1e-10)


@quick
@given(matrices(torch.float64))
def test_it_is_the_qr_decomposition_with_a_positive_diagonal(raw: Tensor) -> None:
    torch.testing.assert_close(orthonormal_rows(raw), positive_qr(raw), rtol=0, atol=1e-10)


@quick
@given(matrices(), st.data())
def test_positive_scales_of_rows_do_not_matter(raw: Tensor, data: st.DataObject) -> None:
    exponents = [data.draw(st.integers(-40, 40)) for _ in raw]
    scales = torch.tensor([2.0**exponent for exponent in exponents])[:, None]
    torch.testing.assert_close(
        orthonormal_rows(scales * raw), orthonormal_rows(raw), rtol=0, atol=1e-5
    )


@settings(max_examples=10, deadline=None)
@given(matrices(torch.float64))
def test_gradients_are_exact(raw: Tensor) -> None:
    assert torch.autograd.gradcheck(orthonormal_rows, raw.requires_grad_())


def test_second_gradients_are_exact() -> None:
    raw = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(orthonormal_rows, raw)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 3, 4, 16)])
def test_a_batch_is_one_by_one(shape: tuple[int, ...]) -> None:
    raw = torch.randn(shape)
    batched = orthonormal_rows(raw).flatten(0, -3)
    single = torch.stack([orthonormal_rows(one) for one in raw.flatten(0, -3)])
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_is_computed_in_fp32(dtype: torch.dtype) -> None:
    raw = torch.randn(RANK, WIDTH).to(dtype)
    rows = orthonormal_rows(raw)
    assert rows.dtype == torch.float32
    assert gap(rows) <= 1e-6


def test_autocast_does_not_lower_the_precision() -> None:
    raw = torch.randn(RANK, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = orthonormal_rows(raw)
    assert torch.equal(rows, orthonormal_rows(raw))


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], id="equal"),
        pytest.param([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]], id="multiple"),
        pytest.param([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]], id="opposite"),
        pytest.param([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [4.0, 3.0, 5.0]], id="sum"),
        pytest.param([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], id="zero"),
        pytest.param([[1.0, 2.0], [3.0, 1.0], [2.0, 5.0]], id="more rows than columns"),
    ],
)
def test_dependent_rows_give_nan(raw: list[list[float]]) -> None:
    assert orthonormal_rows(torch.tensor(raw)).isnan().all()


@quick
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_a_row_in_the_span_of_the_others_gives_nan(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(rank, WIDTH, generator=generator)
    raw[-1] = torch.randn(rank - 1, generator=generator) @ raw[:-1]
    assert orthonormal_rows(raw).isnan().all()


def test_dependent_rows_spoil_no_other_matrix_of_the_batch() -> None:
    raw = torch.randn(3, 2, 8)
    raw[1] = 0
    rows = orthonormal_rows(raw)
    assert rows[1].isnan().all()
    assert gap(rows[[0, 2]]) <= 1e-6


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_starts_at_half_of_r(dtype: torch.dtype) -> None:
    module = LowRankRotation(WIDTH, RANK, dtype)
    assert module.weight.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(module(), 2 * module.weight, rtol=0, atol=1e-6)


def regression_step(modules: list[LowRankRotation], inputs: Tensor, targets: Tensor) -> Tensor:
    """LoReFT in small: the mean squared error of h + Rᵀ(b − Rh) for every module."""
    loss = torch.zeros(())
    with shared_bases(modules):
        for module in modules:
            basis = module()
            edited = inputs + (1 - inputs @ basis.T) @ basis
            loss = loss + (edited - targets).square().mean()
        loss.backward()
    return loss.detach()


@pytest.mark.usefixtures("unchecked_types")  # many steps, the shapes are checked elsewhere
@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_stay_orthonormal_over_many_steps_and_a_reload(steps: int) -> None:
    modules = [LowRankRotation(WIDTH, RANK) for _ in range(2)]
    inputs, targets = torch.randn(2, 16, WIDTH)
    start = [module.weight.detach().clone() for module in modules]

    def train(steps: int) -> None:
        groups = [
            {"params": [module.weight], "weight_decay": decay}
            for module, decay in zip(modules, (0.0, 0.1), strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        for _ in range(steps):
            regression_step(modules, inputs, targets)
            optimizer.step()
            optimizer.zero_grad()

    before = regression_step(modules, inputs, targets)
    train(steps - 500)
    assert all(gap(module()) <= 1e-5 for module in modules)

    saved = [module.state_dict() for module in modules]
    modules = [LowRankRotation(WIDTH, RANK) for _ in saved]
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)
        assert torch.equal(module(), orthonormal_rows(state["weight"]))
    train(500)
    assert all(gap(module()) <= 1e-5 for module in modules)
    assert regression_step(modules, inputs, targets) < before
    for module, weight in zip(modules, start, strict=True):  # it did move
        assert (module() - orthonormal_rows(weight)).abs().max() > 0.1


def test_weight_decay_alone_moves_nothing() -> None:
    module = LowRankRotation(WIDTH, RANK)
    before = module().detach()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=1.0)
    module.weight.grad = torch.zeros_like(module.weight)
    for _ in range(200):
        optimizer.step()
    assert module.weight.abs().max() < 1e-9  # 0.9²⁰⁰ of what it was
    torch.testing.assert_close(module(), before, rtol=0, atol=1e-6)


# -- the evaluation cache ------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that `orthonormal_rows` has been called with."""
    seen: list[torch.Size] = []

    def counted(raw: Tensor) -> Tensor:
        seen.append(raw.shape)
        return orthonormal_rows(raw)

    monkeypatch.setattr(rotation, "orthonormal_rows", counted)
    return seen


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_once(calls: list[torch.Size], no_gradients: type) -> None:
    module = LowRankRotation(WIDTH, RANK).eval()
    with no_gradients():
        first, again = module(), module()
    assert len(calls) == 1
    assert torch.equal(first, again)
    assert torch.equal(first, orthonormal_rows(module.weight.detach()))


def test_a_frozen_rotation_is_computed_once_with_gradients_enabled(
    calls: list[torch.Size],
) -> None:
    module = LowRankRotation(WIDTH, RANK).eval().requires_grad_(False)
    assert module() is module()
    assert len(calls) == 1


def test_training_computes_every_time(calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK)
    assert module().requires_grad
    assert module().requires_grad
    assert len(calls) == 2


def change_in_place(module: LowRankRotation) -> None:
    with torch.no_grad():
        module.weight.add_(1.0)


def change_by_optimizer(module: LowRankRotation) -> None:
    module.weight.grad = torch.randn_like(module.weight)
    torch.optim.SGD([module.weight], lr=1.0).step()
    module.weight.grad = None


def load(module: LowRankRotation) -> None:
    module.load_state_dict({"weight": torch.randn(RANK, WIDTH)})


def load_by_assignment(module: LowRankRotation) -> None:
    module.load_state_dict({"weight": torch.randn(RANK, WIDTH)}, assign=True)


def replace_parameter(module: LowRankRotation) -> None:
    module.weight = torch.nn.Parameter(torch.randn(RANK, WIDTH))


def set_from_vector(module: LowRankRotation) -> None:
    torch.nn.utils.vector_to_parameters(torch.randn(RANK * WIDTH), [module.weight])


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_by_optimizer,
        load,
        load_by_assignment,
        replace_parameter,
        set_from_vector,
        LowRankRotation.reset_parameters,
        LowRankRotation.double,
        LowRankRotation.eval,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(change: type, calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK).eval()
    for expected in (1, 2, 3):  # two changes: the second must not be taken for the first
        with torch.no_grad():
            rows = module()
        assert torch.equal(rows, orthonormal_rows(module.weight.detach()))
        assert len(calls) == expected
        change(module)


def test_evaluation_with_gradients_does_not_use_the_cache() -> None:
    module = LowRankRotation(WIDTH, RANK).eval()
    with torch.no_grad():
        module()
    weights = torch.randn(RANK, WIDTH)
    (module() * weights).sum().backward()
    raw = module.weight.detach().double().requires_grad_()
    (positive_qr(raw) * weights.double()).sum().backward()
    torch.testing.assert_close(module.weight.grad.double(), raw.grad, rtol=0, atol=1e-5)


def test_what_inference_mode_cached_may_meet_autograd() -> None:
    module = LowRankRotation(WIDTH, RANK).eval().requires_grad_(False)
    with torch.inference_mode():
        cached = module()
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    assert module() is cached
    (hidden @ module().T).sum().backward()
    torch.testing.assert_close(hidden.grad, cached.sum(0).expand(3, -1), rtol=0, atol=1e-6)


# -- one batched call for many rotations ---------------------------------------------------------


def test_shared_bases_are_the_bases_and_their_gradients(calls: list[torch.Size]) -> None:
    shapes = [(16, 2), (16, 2), (24, 3), (16, 2)]
    modules = [LowRankRotation(width, rank) for width, rank in shapes]
    weights = [torch.randn_like(module.weight) for module in modules]
    with shared_bases(modules):
        shared = [module() for module in modules]
        assert [module() is basis for module, basis in zip(modules, shared, strict=True)]
    assert sorted(calls) == [(1, 3, 24), (3, 2, 16)]

    sum((a * b).sum() for a, b in zip(shared, weights, strict=True)).backward()
    for module, basis, weight in zip(modules, shared, weights, strict=True):
        raw = module.weight.detach().double().requires_grad_()
        alone = positive_qr(raw)
        (alone * weight.double()).sum().backward()
        torch.testing.assert_close(basis.double(), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(module.weight.grad.double(), raw.grad, rtol=0, atol=1e-5)


def test_a_rotation_of_two_sites_is_computed_once(calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK)
    with shared_bases([module, module]):
        assert module() is module()
    assert calls == [(1, RANK, WIDTH)]


def test_a_block_within_a_block_computes_nothing(calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK)
    with shared_bases([module]):
        outer = module()
        with shared_bases([module]):
            assert module() is outer
        assert module() is outer
    assert len(calls) == 1


def test_evaluation_needs_no_shared_bases(calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK).eval()
    with torch.no_grad(), shared_bases([module]):
        assert not calls
        assert gap(module()) <= 1e-6


def test_an_exception_leaves_no_shared_basis_behind(calls: list[torch.Size]) -> None:
    module = LowRankRotation(WIDTH, RANK)
    with pytest.raises(RuntimeError, match="of the block"), shared_bases([module]):
        raise RuntimeError("of the block")
    change_in_place(module)
    assert torch.equal(module(), orthonormal_rows(module.weight))
    assert len(calls) == 2


def test_a_fused_optimizer_is_noticed_in_evaluation() -> None:
    rotation = LowRankRotation(8, 2).eval()
    optimizer = torch.optim.AdamW(rotation.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        rotation()[0, 0].backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(rotation(), orthonormal_rows(rotation.weight))
