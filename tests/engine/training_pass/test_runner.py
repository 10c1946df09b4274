"""Cheaper passes against the plain one: the base's own forward, loss and logits."""

import copy
import functools
import gc
import logging
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

import reftnoise as rn
from reftnoise.engine.base.running import is_watched
from reftnoise.engine.training_pass.prefix_cache import PrefixCache
from reftnoise.engine.training_pass.split import PromptStates
from support.models.architectures import ARCHITECTURES, tiny_model
from support.tolerance import assert_close, assert_close_gradients
from support.training_steps import PROMPTS, assert_same, batch, plain, split, step, wrapped

POSITIONS: list[Any] = ["l1", "l3", "l2+decode", [-2, -1]]


# -- the same loss and gradients -------------------------------------------------------------------


@pytest.mark.parametrize("noise", [None, "symnoise", "neftune"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_split_pass_is_the_plain_pass(architecture: str, side: str, noise: str | None) -> None:
    noises = [] if noise is None else [{"intervention": noise}]
    model = split(wrapped("l3", *noises, base=tiny_model(architecture)))
    inputs = batch(side)
    expected = plain(model, inputs)
    assert_same(step(model, inputs, return_logits=False), expected)
    found = step(model, inputs)
    assert_same(found, expected)
    attended = inputs["attention_mask"].bool()
    assert_close(found[0].logits[attended], expected[0].logits[attended])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_from_an_earlier_epoch_change_nothing(architecture: str, side: str) -> None:
    model = split(wrapped(base=tiny_model(architecture)))
    inputs = batch(side)
    expected = plain(model, inputs)
    model.prefix_cache = PrefixCache()
    for hits in (0, 4, 8):
        assert_same(step(model, inputs, return_logits=False), expected)
        assert (model.prefix_cache.hits, model.prefix_cache.misses) == (hits, 4)
    found = step(model, inputs)  # logits of prompts, which are computed anew
    attended = inputs["attention_mask"].bool()
    assert_close(found[0].logits[attended], expected[0].logits[attended])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_position(side: str, positions: Any) -> None:
    model, inputs = split(wrapped(positions)), batch(side)
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


@pytest.mark.parametrize("positions", ["f2", "f1+l1", "all", "all+decode", [0, 3]])
def test_nothing_is_split_where_the_prompts_start_is_edited(positions: Any) -> None:
    model, inputs = wrapped(positions), batch()
    step(model, inputs)  # the base is tried out
    with Calls(model.model.model) as calls:
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    assert calls.widths == [25, 25]
    model.split = "always"
    with pytest.raises(ValueError, match="split 'always': nothing comes before the first edit"):
        model(**inputs)


def test_left_padding_without_position_ids_counts_padding_as_the_base_does() -> None:
    model = split(wrapped(base=tiny_model("gpt2")))
    inputs = batch("left", position_ids=False)
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "qwen3"])
def test_windows_shorter_than_the_prompt(architecture: str) -> None:
    more = {"use_sliding_window": True, "max_window_layers": 1} if architecture == "qwen3" else {}
    base = tiny_model(architecture, sliding_window=4, **more)
    model, inputs = split(wrapped(base=base)), batch()
    expected = plain(model, inputs)
    model.prefix_cache = PrefixCache()
    for _ in range(2):
        assert_same(step(model, inputs, return_logits=False), expected)


def test_explicit_locations() -> None:
    model, inputs = split(wrapped()), batch()
    last = [[p - 1] for p in PROMPTS]
    locations = {"sources->base": (None, [last] * 3)}
    expected = plain(model, inputs, unit_locations=locations)
    assert_same(step(model, inputs, unit_locations=locations, return_logits=False), expected)
    assert_same(step(model, inputs, return_logits=False), expected)


def test_labels_on_the_prompt_are_in_the_loss() -> None:
    model, inputs = split(wrapped()), batch()
    prompt = torch.tensor(PROMPTS)
    column = torch.arange(25)
    near = (column >= prompt[:, None] - 4) & (column > 0) & inputs["attention_mask"].bool()
    inputs["labels"] = inputs["input_ids"].masked_fill(~near, -100)
    inputs["prompt_lengths"] = prompt
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_a_row_without_labels() -> None:
    model, inputs = split(wrapped()), batch()
    inputs["labels"][0] = -100
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_a_batch_without_labels() -> None:
    model, inputs = split(wrapped()), batch()
    inputs["labels"][:] = -100
    inputs["num_items_in_batch"] = 7
    output, gradients = step(model, inputs, return_logits=False)
    assert output.loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_the_loss_is_divided_by_what_the_trainer_counts(count: Any) -> None:
    model, inputs = split(wrapped()), batch()
    inputs["num_items_in_batch"] = count
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_embeddings_instead_of_tokens() -> None:
    model, inputs = split(wrapped("l1", {"intervention": "neftune"})), batch()
    embedded = model.model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embedded
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_bfloat16() -> None:
    model, inputs = split(wrapped(base=tiny_model().bfloat16())), batch()
    found, expected = step(model, inputs, return_logits=False), plain(model, inputs)
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-2, atol=0)
    assert found[0].loss.dtype == torch.float32


def test_autocast() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(model, inputs, return_logits=False), plain(model, inputs)
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-2, atol=0)
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))  # cached in fp32


def test_dropout_of_the_edits_is_drawn_alike() -> None:
    model = split(wrapped())
    for unit in model.interventions.values():
        unit.dropout.p = 0.5
    inputs = {name: value[:1, :16] for name, value in batch().items()}  # one row: equal draws
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


# -- what it saves ---------------------------------------------------------------------------------


class Calls:
    """The widths with which a module is called, without a hook on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.widths = module, []  # type: tuple[nn.Module, list[int]]

    def __enter__(self) -> "Calls":
        forward = self.module.forward

        def counted(input_ids: Tensor, **inputs: Any) -> Any:
            self.widths.append(input_ids.shape[1])
            return forward(input_ids, **inputs)

        self.module.forward = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        del self.module.forward


def test_only_what_follows_the_first_edit_is_run_with_gradients() -> None:
    model, inputs = wrapped(), batch()
    step(model, inputs)  # the base is tried out
    with Calls(model.model.model) as calls:
        step(model, inputs, return_logits=False)
    # Before the last prompt token at most 19, then at most 6 that predict a label.
    assert calls.widths == [19, 6]


def test_a_kept_prompt_is_not_run_again() -> None:
    model, inputs = wrapped(), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    with Calls(model.model.model) as calls:
        step(model, inputs, return_logits=False)
        inputs["input_ids"][2, 1] = 50
        step(model, inputs, return_logits=False)
    assert calls.widths == [6, 19, 6]
    assert model.prefix_cache.misses == 5


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is computed."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("positions", ["l1", "f1"])
def test_no_more_logits_than_a_chunk_are_held(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(vocab_size=20_000)
    model, inputs = wrapped(positions, base=base), batch()
    expected = plain(model, inputs)
    monkeypatch.setattr("reftnoise.engine.training_pass.loss.MAX_LOGITS", 3 * 20_000)
    with Largest() as largest:
        found = step(model, inputs, return_logits=False)
    assert largest.elements <= base.lm_head.weight.numel()
    assert_same(found, expected)


def test_the_base_stays_as_it_is() -> None:
    model, inputs = wrapped(), batch()
    for _ in range(2):
        step(model, inputs)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
        assert all(module.training for module in model.model.modules())
        assert "_loss_function" not in vars(model.model)


def test_an_error_in_the_base_leaves_nothing_behind() -> None:
    model, inputs = split(wrapped()), batch()
    step(model, inputs)
    expected = model.model(**inputs).loss
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        step(model, inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    inputs["input_ids"][0, 0] = batch()["input_ids"][0, 0]
    assert torch.equal(model.model(**inputs).loss, expected)


# -- where it is not possible ----------------------------------------------------------------------


def assert_plain(model: rn.ReftModel, inputs: dict[str, Any], reason: str, caplog: Any) -> None:
    """The pass gives what the plain one does, says why, and cannot be forced."""
    with caplog.at_level(logging.INFO, logger="reftnoise"):
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    assert reason in caplog.text
    model.split = "always"
    with pytest.raises(ValueError, match=f"split 'always': .*{reason}"):
        model(**inputs)


def test_a_trained_base(caplog: Any) -> None:
    model = wrapped()
    model.model.lm_head.weight.requires_grad_()
    assert_plain(model, batch(), "parameters of the base are trained", caplog)
    head = model.model.lm_head.weight
    model.split = "never"
    (_, _), head_grad = plain(model, batch()), head.grad.clone()
    step(model, batch(), return_logits=False)
    assert_close_gradients([head.grad], [head_grad])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_lora_under_reft(caplog: Any) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = peft.get_peft_model(tiny_model(), lora)
    config = rn.ReftConfig(
        [{"layer": 1, "intervention": "loreft", "low_rank_dimension": 2, "positions": "l1"}]
    )
    model = rn.get_reft_model(base, config, disable_model_grads=False).train()
    assert_plain(model, batch(), "parameters of the base are trained", caplog)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_gradient_checkpointing(caplog: Any) -> None:
    model = wrapped()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_plain(model, batch(), "gradient checkpointing takes no cache", caplog)


def test_packed_rows(caplog: Any) -> None:
    model, inputs = wrapped(), batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_ids"] = torch.arange(25).remainder(9).expand(4, -1)
    assert_plain(model, inputs, "rows are packed", caplog)


def test_hooks_of_others_see_the_batch_as_it_is(caplog: Any) -> None:
    model, seen = wrapped(), []
    handle = model.model.model.layers[1].register_forward_hook(
        lambda _, __, output: seen.append(output.shape)
    )
    assert_plain(model, batch(), "a foreign hook reads the base", caplog)
    assert seen == [(4, 25, 32)] * 2
    assert len(model.model.model.layers[1]._forward_hooks) == 1
    handle.remove()


def test_hooks_of_others_on_the_head_see_all_logits(caplog: Any) -> None:
    model, seen = wrapped(), []
    model.model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    assert_plain(model, batch(), "a foreign hook reads the head", caplog)
    assert seen == [(4, 25, 101)] * 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_position_embeddings_that_depend_on_the_length(kind: str, caplog: Any) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope |= {"original_max_position_embeddings": 16}
    model = wrapped(base=tiny_model(rope_parameters=rope, max_position_embeddings=16))
    assert_plain(model, batch(), "position embeddings, which depend on length", caplog)


def test_a_loss_of_its_own(caplog: Any) -> None:
    def normaliser(logits: Tensor, **_: Any) -> Tensor:
        return logits.logsumexp(-1).mean()

    base = tiny_model()
    base.loss_function = normaliser
    assert_plain(wrapped(base=base), batch(), "the base has a loss_function of its own", caplog)


def test_a_loss_that_differs_for_some_tokens_only(caplog: Any) -> None:
    weights = torch.ones(101).index_fill(0, torch.tensor(50), 9.0)

    def weighted(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets, weights)

    model = wrapped()
    step(model, batch())
    model.model.loss_function = weighted  # also after a first pass
    assert_plain(model, batch(), "the base has a loss_function of its own", caplog)


def test_a_forward_replaced_on_the_instance(caplog: Any) -> None:
    model = wrapped()
    step(model, batch())
    model.model.forward = functools.partial(type(model.model).forward, model.model)
    assert_plain(model, batch(), "forward was replaced on the instance", caplog)


def test_a_loss_of_training_alone(caplog: Any) -> None:
    class Penalised(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            output = super().forward(*inputs, **named)
            if self.training and output.loss is not None:
                output.loss = output.loss + 1
            return output

    base = tiny_model()
    base.__class__ = Penalised
    assert_plain(wrapped(base=base), batch(), "its loss is more than its loss_function", caplog)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_states_that_the_config_asks_for_are_of_the_batch_as_it_is(asked: str, caplog: Any) -> None:
    base = tiny_model(attn_implementation="eager", **{asked: True})
    model = wrapped(base=base)
    assert_plain(model, batch(), "config asks for what it computes in between", caplog)
    model.split = "auto"
    output = model(**batch())
    assert (output.hidden_states or output.attentions)[-1].shape[-2] == 25


def test_modules_that_are_sharded_across_processes() -> None:
    module = nn.Linear(2, 2)
    assert not is_watched(module)
    module.register_forward_pre_hook(torch.distributed.fsdp.fully_shard)
    assert is_watched(module)
    sharded = type("Sharded", (nn.Linear,), {"__module__": "torch.distributed.fsdp"})(2, 2)
    assert is_watched(sharded)


def test_a_state_space_model(caplog: Any) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=101, hidden_size=32, state_size=4, num_hidden_layers=3)
    base = MambaForCausalLM(config)
    model, inputs = wrapped(base=base), batch()
    one_row = {name: value[2:3] for name, value in inputs.items()}
    assert_plain(model, one_row, "MambaForCausalLM", caplog)
    model.split = "auto"
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_labels_of_other_kinds_are_the_bases_own() -> None:
    model, inputs = wrapped(), batch()
    inputs["labels"][1, 0] = 5  # predicted from nothing: no base counts it
    expected = model.model(**inputs).loss
    model.interventions.requires_grad_(False)
    with torch.no_grad():
        for unit in model.interventions.values():
            unit.learned_source.weight.copy_(unit.rotate_layer())
            unit.learned_source.bias.zero_()
        assert_close(model(**inputs).loss, expected)


def test_a_mode_that_does_not_exist() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="split 'no': expected 'auto', 'always' or 'never'"):
        model.split = "no"  # type: ignore[assignment]
    assert model.split == "auto"


def test_never() -> None:
    model, inputs = wrapped(), batch()
    step(model, inputs)
    model.split = "never"
    with Calls(model.model.model) as calls:
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    assert calls.widths == [25, 25]


# -- logits ----------------------------------------------------------------------------------------


def test_logits_are_there_for_whoever_reads_them() -> None:
    model, inputs = wrapped(), batch("left")
    expected = plain(model, inputs)[0]
    attended = inputs["attention_mask"].bool()
    readers: list[Any] = [
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output[1],
        lambda output: output[:2][1],
        lambda output: output.to_tuple()[1],
        lambda output: dict(output)["logits"],
        lambda output: output.get("logits"),
        lambda output: (output | {})["logits"],
        lambda output: copy.copy(output).logits,
        lambda output: list(output.values())[1],
        lambda output: torch.utils._pytree.tree_flatten(output)[0][1],
        lambda output: next(value for name, value in output.items() if name == "logits"),
    ]
    for read in readers:
        found = read(model(**inputs))[attended]
        assert_close(found, expected.logits[attended])
        assert found.requires_grad


def test_reading_the_loss_computes_no_logits() -> None:
    model, inputs = wrapped(base=tiny_model(vocab_size=20_000)), batch()
    model(**inputs)
    with Largest() as largest:
        output = model(**inputs)
        assert "loss" in output
        assert output.loss is output["loss"] is output[0]
    assert largest.elements < 4 * 25 * 20_000 / 2
    assert output.logits.shape == (4, 25, 20_000)
    assert list(output)[:2] == ["loss", "logits"]


def test_logits_can_be_left_out_or_computed_at_once() -> None:
    model, inputs = wrapped(), batch()
    assert model(**inputs, return_logits=False).logits is None
    assert "logits" in dict(model(**inputs, return_logits=True))
    without = {name: value for name, value in inputs.items() if name != "labels"}
    assert model(**without, return_logits=False).logits is not None
    _, output = model(inputs, return_logits=False)
    assert output.logits is None


def test_logits_of_the_first_of_each_pair() -> None:
    model, inputs = split(wrapped("l1", {"intervention": "symnoise"})), batch()
    expected = plain(model, inputs)[0].logits
    found = step(model, inputs)[0].logits
    assert found.shape == expected.shape == (4, 25, 101)
    attended = inputs["attention_mask"].bool()
    assert_close(found[attended], expected[attended])


def test_an_output_made_from_another_is_plain() -> None:
    model, inputs = wrapped(), batch()
    output = model(**inputs)
    kind = type(output)  # as accelerate takes it, before it reads the items
    again = kind(**output.items().mapping)
    assert type(again) is type(output)
    assert again.logits is output.logits
    copied = pickle.loads(pickle.dumps(model(**inputs)))
    assert_close(copied.logits, output.logits)


def test_logits_that_are_set() -> None:
    output = wrapped()(**batch())
    output.logits = None
    assert output.logits is None
    assert "logits" not in output
    output = wrapped()(**batch())
    output.logits = torch.ones(1)
    assert output["logits"] is output.logits


def test_a_base_that_does_not_call_its_decoder(caplog: Any) -> None:
    config = OPTConfig(
        vocab_size=101,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        dropout=0.0,
        word_embed_proj_dim=32,
    )
    model = wrapped(base=OPTForCausalLM(config))
    assert_plain(model, batch(), "OPTForCausalLM does not call its 'model' once", caplog)


def test_second_gradients_are_refused_where_they_would_be_wrong() -> None:
    model, inputs = wrapped(base=tiny_model(attn_implementation="eager")), batch()
    parameters = list(model.interventions.parameters())
    with pytest.raises(RuntimeError, match="call the model with return_logits=True"):
        torch.autograd.grad(model(**inputs).loss, parameters, create_graph=True)
    loss = model(**inputs, return_logits=True).loss
    (first, *_) = torch.autograd.grad(loss, parameters, create_graph=True)
    first.square().sum().backward()


def test_an_output_does_not_keep_keys_and_values() -> None:
    model, inputs = split(wrapped()), batch()
    states = []
    initialise = PromptStates.__init__

    def remembered(self: PromptStates, *args: Any) -> None:
        initialise(self, *args)
        states.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptStates, "__init__", remembered)
        output = model(**inputs)
    gc.collect()
    assert states
    assert not any(state() for state in states)
    assert output.logits is not None


def test_evaluation_computes_logits_on_demand() -> None:
    model, inputs = wrapped().eval(), batch()
    with torch.no_grad():
        expected = model(**inputs, return_logits=True)
        found = model(**inputs)
        assert_close(found.loss, expected.loss)
        assert_close(found.logits, expected.logits)


# -- logits at labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "unsplit", "kept", "noised", "disabled"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_labels_are_those_of_the_base(side: str, way: str) -> None:
    noises = [{"intervention": "symnoise"}] if way == "noised" else []
    model, inputs = wrapped("l1", *noises, base=tiny_model()), batch(side)
    predicts = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
    if way == "whole":
        inputs["output_attentions"] = False  # which only the base's own forward is given
        model.model.loss_function = lambda **_: torch.zeros(())
    if way == "kept":
        model.prefix_cache = PrefixCache()
    model.train(way == "noised")
    scope = model.disabled() if way == "disabled" else torch.no_grad()
    with scope, torch.no_grad():
        torch.manual_seed(1)
        expected = model(**inputs, return_logits=True).logits[predicts]
        for hits in (0, 4):
            torch.manual_seed(1)
            assert_close(model(**inputs, return_logits="labels").logits, expected)
            if way == "kept":
                assert (model.prefix_cache.hits, model.prefix_cache.misses) == (hits, 4)
    with pytest.raises(ValueError, match="return_logits 'labels': expected labels, too"):
        model.eval()(inputs["input_ids"], return_logits="labels")


def test_evaluation_reads_kept_prompts_and_noise_is_not_kept() -> None:
    model, inputs = wrapped("l1", {"intervention": "neftune"}, base=tiny_model()), batch()
    model.prefix_cache = PrefixCache()
    with torch.no_grad():
        expected = model.eval()(**inputs, return_logits=True).loss
        assert_close(model(**inputs, return_logits=False).loss, expected)
        with model.engine.settings.block(is_noised=True):
            model(**inputs, return_logits=False)
        assert_close(model(**inputs, return_logits=False).loss, expected)
    assert (model.prefix_cache.hits, model.prefix_cache.misses) == (4, 4)
