"""Bases that are compiled, whole or in parts: edited in our passes, bare in all others.

torch.compile does not notice that hooks come or go, so every case calls the bare base first, which
leaves code without edits, and again afterwards.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

import reftnoise as rn
from reftnoise.engine.training_pass.prefix_cache import PrefixCache
from support.models.architectures import tiny_model
from support.tolerance import assert_close, assert_close_gradients
from support.training_steps import batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    # torch.compile looks at what it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
KIND: dict[str, Any] = {"backend": "eager"}  # as compiled as any, as far as hooks are concerned


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def small_model() -> Any:
    return tiny_model(num_hidden_layers=2)


def whole_in_place(base: Any) -> Any:
    base.compile(**KIND)
    return base


def decoder_in_place(base: Any) -> Any:
    base.model.compile(**KIND)
    return base


def layers_in_place(base: Any) -> Any:
    for layer in base.model.layers:
        layer.compile(**KIND)
    return base


def layers_replaced(base: Any) -> Any:
    for index, layer in enumerate(base.model.layers):
        base.model.layers[index] = torch.compile(layer, **KIND)
    return base


def regions(base: Any) -> Any:
    return compile_regions(base, **KIND)


def mlps_in_place(base: Any) -> Any:
    for layer in base.model.layers:
        layer.mlp.compile(**KIND)
    return base


def whole_forward(base: Any) -> Any:
    base.forward = torch.compile(base.forward, **KIND)
    return base


def layer_forwards(base: Any) -> Any:
    for layer in base.model.layers:
        layer.forward = torch.compile(layer.forward, **KIND)
    return base


WAYS = [
    whole_in_place,
    decoder_in_place,
    layers_in_place,
    layers_replaced,
    regions,
    mlps_in_place,
    whole_forward,
    layer_forwards,
]
slow = pytest.mark.slow
some_ways = pytest.mark.parametrize(
    "way",
    [layers_in_place, pytest.param(whole_in_place, marks=slow), pytest.param(regions, marks=slow)],
    ids=lambda way: way.__name__,
)
Way = Callable[[Any], Any]


def wrapped(base: Any, positions: str = "f1+l1", component: str = "block_output") -> rn.ReftModel:
    torch.manual_seed(1)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    config = rn.ReftConfig([loreft | {"positions": positions, "component": component}])
    return rn.get_reft_model(base.requires_grad_(False), config)


def step(model: rn.ReftModel, called: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = (model if called is None else called)(**batch(), **options).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.interventions.parameters()])


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_close(found[0], expected[0])
    assert_close_gradients([found[1]], [expected[1]])


CASES: list[Any] = [(way, "block_output") for way in (whole_in_place, layers_replaced, regions)]
CASES += [(mlps_in_place, "mlp_output"), (whole_forward, "block_output")]
OTHERS = [(way, "block_output") for way in WAYS]
OTHERS += [(way, "mlp_output") for way in (layers_in_place, layers_replaced)]
CASES += [pytest.param(*case, marks=slow) for case in OTHERS if case not in CASES]


@pytest.mark.parametrize(("way", "component"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_a_compiled_base_is_edited(way: Way, component: str) -> None:
    expected = step(wrapped(small_model(), component=component).train(), return_logits=True)
    bare = small_model()(**batch()).loss
    base = way(small_model().requires_grad_(False))
    assert torch.equal(base(**batch()).loss, bare)
    model = wrapped(base, component=component).train()
    for _ in range(2):
        assert_same(step(model, return_logits=True), expected)
        base.eval()
        assert torch.equal(base(**batch()).loss, bare)
        model.train()
    with model.eval().disabled():
        assert torch.equal(model(**batch()).loss, bare)


@pytest.mark.parametrize(
    "way",
    [layers_in_place, *(pytest.param(w, marks=slow) for w in (whole_in_place, layers_replaced))],
)
def test_compiled_after_it_was_wrapped(way: Way) -> None:
    expected = step(wrapped(small_model()), return_logits=True)
    model = wrapped(small_model())
    way(model.model)(**batch())
    assert_same(step(model, return_logits=True), expected)


@some_ways
def test_split_passes_kept_prompts_and_checkpoints(way: Way) -> None:
    expected = step(wrapped(small_model(), "l1").train(), return_logits=True)
    base = way(small_model())
    base(**batch())
    model = wrapped(base, "l1").train()
    model.split = "always"
    model.prefix_cache = PrefixCache()
    for _ in range(2):
        assert_same(step(model, return_logits=False), expected)
    model.split = "auto"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(model), expected)


@some_ways
def test_one_graph_of_a_base_that_is_compiled_already(way: Way) -> None:
    expected = step(wrapped(small_model()).train(), return_logits=True)
    base = way(small_model())
    base(**batch())
    model = wrapped(base).train()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, **KIND)
    assert_same(step(model, compiled, use_cache=False), expected)
    assert not counters["graph_break"]
    assert_same(step(model, return_logits=True), expected)


def test_layers_stay_compiled_under_edits() -> None:
    model = wrapped(layers_in_place(small_model()), "l1").train()
    step(model, return_logits=False)
    assert counters["stats"]["unique_graphs"] >= len(model.model.model.layers)
    assert not counters["graph_break"]


# -- generation ------------------------------------------------------------------------------------


def generated(model: Any, **settings: Any) -> Tensor:
    prompt = batch()["input_ids"][:, :9]
    tokens: Tensor = model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **settings
    )
    return tokens


CHUNKS = {"prefill_chunk_size": 5}


@pytest.mark.parametrize(
    ("positions", "chunks"),
    [
        ("l1", CHUNKS),
        ("all+decode", {}),
        pytest.param("l1", {}, marks=slow),
        pytest.param("all+decode", CHUNKS, marks=slow),
    ],
)
def test_generation_that_compiles_the_base(positions: str, chunks: dict[str, int]) -> None:
    expected = generated(wrapped(small_model(), positions).eval())
    bare = generated(small_model())
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # otherwise on accelerators alone
    static = {"cache_implementation": "static", "compile_config": config} | chunks
    base = small_model().requires_grad_(False)
    model = wrapped(base, positions).eval()
    for _ in range(2):
        assert torch.equal(generated(base, **static), bare)
        assert torch.equal(generated(model, **static), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("positions", ["all+decode", pytest.param("l1", marks=slow)])
@torch.no_grad()
def test_prefill_and_decode_are_graphs(positions: str) -> None:
    model = wrapped(small_model(), positions).eval()
    compiled = torch.compile(model, fullgraph=True, **KIND)
    prompt, lengths = batch()["input_ids"][:, :9], torch.full((4,), 9)
    expected, found = (one(input_ids=prompt, use_cache=True) for one in (model, compiled))
    for width in (10, 11):
        assert_close(found.logits, expected.logits)
        more = {"input_ids": torch.full((4, 1), 7), "attention_mask": torch.ones(4, width).long()}
        expected, found = (
            one(**more, past_key_values=before.past_key_values, prompt_lengths=lengths)
            for one, before in ((model, expected), (compiled, found))
        )
    assert not counters["graph_break"]


# -- what cannot work ------------------------------------------------------------------------------


def test_a_model_that_torch_compile_returned() -> None:
    with pytest.raises(
        ValueError, match=r"give the model itself, then torch.compile\(reft_model\)"
    ):
        wrapped(torch.compile(small_model(), **KIND))


def test_regions_of_a_reft_model() -> None:
    model = compile_regions(wrapped(small_model()), **KIND)
    with pytest.raises(ValueError, match=r"^the base was replaced"):
        model(**batch())
