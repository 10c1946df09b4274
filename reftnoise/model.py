"""`ReftModel`: a frozen base model with its units; called and generating like the base."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from ._util.errors import brief
from .adapters import saving
from .adapters.library import OWN, AdapterChoice, AdapterLibrary
from .adapters.mixin import AdapterMixin
from .adapters.pyreft.calling import TakesBatches, in_forms_of_pyreft
from .adapters.pyreft.methods import expect_native
from .adapters.vocabulary import expect_tokens
from .config.representations import ReftConfig
from .engine.base.methods import OTHER_WRAPPER, REFUSED, keep_differentiable, may_run_layers
from .engine.base.peft import inner_model, is_peft_model, section_of, with_peft, without_peft
from .engine.base.running import exclusive, innermost
from .engine.base.sites import trained_modules
from .engine.base.threads import undone_in_children
from .engine.generation import generate_edited
from .engine.hooks import Engine
from .engine.layout import Batch, UnitLocations
from .engine.planning import Planner, TrainingChecks
from .engine.settings import Arithmetic
from .engine.training_pass.fused_head import call_fused, expect_plain_head, has_fused_head
from .engine.training_pass.loss import at_labels
from .engine.training_pass.mixin import TrainingMixin
from .engine.training_pass.pairs import ascend, in_pairs_of, mean_of_pairs
from .engine.training_pass.prefix_cache import PrefixCache
from .engine.training_pass.runner import ForwardPasses, Logits, SplitMode
from .engine.units import Subspaces, place_units, subspace_gates


class ReftModel(TakesBatches, TrainingMixin, AdapterMixin):
    """A base model whose hidden states are edited, and perturbed in training, by units.

    It is called like the base and returns the base's output class; `generate` returns token ids.
    `adapters.pyreft.forms` has the other forms of a call: those of pyreft.
    Attributes that it does not have itself (`config`, `device`, `generation_config`,
    `gradient_checkpointing_enable`, …) are the base's, but for those in `engine.base.methods`.

    Args:
        config: the units.
        model: the base, a transformers model. Its weights are neither copied nor changed; a `peft`
            section puts PEFT's layers into it.
        pyvene: further arguments of pyvene's models, of which none does anything.

    Raises:
        ValueError: an entry does not fit the base: layer, width, rank or overlapping positions.
        TypeError: an argument that pyvene's models do not have.
    """

    _hf_peft_config_loaded = True
    """Tells transformers' Trainer that units are trained, not the quantised base."""

    def __init__(self, config: ReftConfig, model: PreTrainedModel, **pyvene: Any) -> None:
        super().__init__()
        expect_native(pyvene)
        if isinstance(config, nn.Module):
            raise ValueError("the arguments are swapped: ReftModel(config, model)")
        if isinstance(model, ReftModel):
            raise ValueError("the model is a ReftModel already: put all units into one ReftConfig")
        if type(model).__name__ == "OptimizedModule":
            raise ValueError(
                "the model is compiled: give the model itself, then torch.compile(reft_model)"
            )
        keep_differentiable(model)
        section = section_of(model, config.peft)
        # First: where one of these raises, PEFT has changed nothing.
        expect_tokens(model, config.token_rows)
        trained_modules(model, config.modules_to_save)
        placed = place_units(config, model)
        if section is not None and not is_peft_model(model):
            model = with_peft(model, section)
        self.reft_config = dataclasses.replace(config, peft=section)
        self.model: PreTrainedModel = model
        self.interventions = nn.ModuleDict({own.key: own.unit for own in placed})
        self._split: SplitMode = "auto"
        self._fused_forward: Callable[..., Any] | None = None
        self.prefix_cache: PrefixCache | None = None
        self.engine = Engine(model, placed)
        self.adapters = AdapterLibrary(self.engine)
        self._planner = Planner(self.engine)
        self._passes = ForwardPasses(self.engine)
        self._checks = TrainingChecks(self._planner)
        self.interventions.train(model.training)
        self.training = model.training
        self.register_state_dict_post_hook(saving.keep_trained)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_post_hook(saving.expect_trained)  # type: ignore[no-untyped-call]  # torch's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_is_accelerate_prepared"):
                raise  # the second is accelerate's mark of one object, not of its base
            if name in REFUSED:
                raise AttributeError(f"{name} {REFUSED[name]}") from None
            attribute = getattr(self.model, name)
            if not may_run_layers(inner_model(self.model), name, attribute):
                return attribute

            @functools.wraps(attribute)
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.engine.expecting_no_edit(name):
                    return attribute(*args, **kwargs)

            return run

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("config", "generation_config"):
            setattr(self.model, name, value)
        elif name == "peft_config":  # PEFT's wrappers set it, and nothing else of ours before
            raise ValueError(OTHER_WRAPPER)
        elif self._is_setting_of_base(name):
            setattr(inner_model(self.model), name, value)
        elif name == "forward" and has_fused_head(value):
            expect_plain_head(inner_model(self.model), self.engine.sites)
            self._fused_forward = getattr(value, "__func__", value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A call of another thread would be copied half done, with its hooks.
        with exclusive(inner_model(self.model)):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            state = copy.deepcopy(self.__dict__, memo)
            copied.__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
            return copied

    def _is_setting_of_base(self, name: str) -> bool:
        """Whether the base has a property of that name, such as `loss_function`, and we do not."""
        if hasattr(type(self), name) or "model" not in self._modules:
            return False
        return isinstance(getattr(type(inner_model(self.model)), name, None), property)

    # -- forward -----------------------------------------------------------------------------

    @in_forms_of_pyreft
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        unit_locations: UnitLocations | None = None,
        adapter_names: Sequence[AdapterChoice] | None = None,
        subspaces: Subspaces | None = None,
        return_logits: Logits = None,
        logits_to_keep: int | Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass of the base with the units applied.

        Args:
            input_ids: token ids.
            attention_mask: 1 at tokens, 0 at padding, on either side.
            labels: as the base takes them.
            prompt_lengths: attended tokens in each row's prompt, cached ones and those of later
                calls included: a prompt that is longer than the input goes on. By default it ends
                before the first label that is not -100, and is the whole input where there are no
                labels. With a filled cache and no such information, what is cached is the prompt.
            unit_locations: `{"sources->base": (None, locations)}` with columns nested as
                interventions × batch × positions, instead of the config's positions.
            adapter_names: in evaluation, for each row the name of a loaded adapter, a list of
                names whose edits are added, a mapping from names to scales, `"default"` for the
                model's own units, or None for the bare base.
            subspaces: of the model's own units, the dimensions that each row's edits have, or None
                for all; or, as in pyvene, nested as interventions × batch × dimensions.
            return_logits: with labels, logits that the loss does not need are computed when they
                are read; True computes them in the base's own forward, False leaves them out, and
                `"labels"` gives those that predict a label alone, [labels, vocabulary], row after
                row. In training with SymNoise they are those of the +δ rows.
            logits_to_keep: as the base takes it.
            inputs: the base's other arguments.

        Raises:
            ValueError: masks, locations or widths that do not fit the input; SymNoise in training,
                or `return_logits="labels"`, without labels; `split = "always"` where a pass cannot
                be split.
        """
        named: dict[str, Any] = {"attention_mask": attention_mask, "labels": labels}
        named["logits_to_keep"] = logits_to_keep
        inputs.update({name: value for name, value in named.items() if value is not None})
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        choices = self.engine.settings.now
        if choices.is_disabled:
            with self._bare() as base:
                return self._call(base, inputs, return_logits)
        if self.training and choices.scale != 1.0:
            raise ValueError(
                f"scale {choices.scale}: edits are trained as they are, with scale 1.0"
            )
        batch = Batch.of(inputs, prompt_lengths, unit_locations)
        planner = self._choose(batch, adapter_names, subspaces)
        if planner.engine is not self.engine:
            with planner.engine.running(*planner.plans(batch)):
                return self._call(self.model, inputs, return_logits)
        return self._run(planner, batch, return_logits)

    def _run(self, planner: Planner, batch: Batch, return_logits: Logits) -> Any:
        """A pass with the model's own units."""
        rows = batch.rows
        is_noised = self.training or self.engine.settings.now.is_noised
        paired = [
            placed
            for placed in self.engine.units
            if getattr(placed.unit, "paired", False)
            and (placed.unit.training or not getattr(placed.unit, "compares", False))
        ]
        if is_noised and paired:
            batch = in_pairs_of(batch, paired)
        if batch.compared is not None:
            unit = self.interventions[batch.compared]
            ascend(unit, lambda: self._passes.run(planner.plans(batch), batch, split="never"))
        plans = planner.plans(batch)
        if self.training and not torch.compiler.is_compiling():
            self._checks.check(plans[0], batch)
        if batch.inputs.get("fused_lm_head"):
            with self.engine.running(*plans):
                outputs = self._call(self.model, batch.inputs)
            outputs = self._passes.with_added_loss(outputs, plans[0], batch)
            return outputs if batch.copies == 1 else mean_of_pairs(outputs, rows)
        return self._passes.run(
            plans,
            batch,
            return_logits=return_logits,
            split=self._split,
            prefix_cache=self.prefix_cache,
        )

    @in_forms_of_pyreft
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        unit_locations: UnitLocations | None = None,
        adapter_names: Sequence[AdapterChoice] | None = None,
        subspaces: Subspaces | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the base's own `generate`; the input is the prompt.

        Args:
            inputs: token ids.
            generation_config: as the base's `generate` takes it.
            unit_locations: as in `forward`.
            adapter_names: as in `forward`.
            subspaces: as in `forward`.
            kwargs: as the base's `generate` takes them.

        Raises:
            ValueError: as in `forward`, or a base without `generate`.
        """
        if not hasattr(self.model, "generate"):
            raise ValueError(f"generate: {type(inner_model(self.model)).__name__} writes no tokens")
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if inputs is not None:
            kwargs[inner_model(self.model).main_input_name] = inputs
        kwargs.pop("prompt_lengths", None)  # of a collated batch: here the input is the prompt
        if self.engine.settings.now.is_disabled:
            with self._bare() as base:
                return base.generate(**kwargs)
        batch = Batch.of(kwargs, unit_locations=unit_locations)
        planner = self._choose(batch, adapter_names, subspaces)
        return generate_edited(planner, kwargs, unit_locations)

    def _choose(
        self,
        batch: Batch,
        adapter_names: Sequence[AdapterChoice] | None,
        subspaces: Subspaces | None,
    ) -> Planner:
        """The units that act in a call, and what each row gets of them."""
        if self.engine.base is not self.model:
            raise ValueError(
                "the base was replaced. nn.DataParallel copies it: start one process per device; "
                "so does accelerate's regional compilation: compile the base's layers, or the "
                "whole ReftModel"
            )
        own = next(self.interventions.parameters(), None)
        if own is not None and own.is_meta and self.device.type != "meta":
            raise ValueError(
                "the units are offloaded, and edits need their weights at once: offload the base "
                "before it is wrapped, as by accelerate.cpu_offload(base)"
            )
        active: AdapterChoice = self.engine.settings.now.adapter
        if adapter_names is None and active == OWN:
            if subspaces is None:
                return self._planner
            units, device = self.engine.units, self.device
            return Planner(self.engine, subspace_gates(subspaces, units, batch.rows, device))
        if self.training:
            raise ValueError(
                "adapters that are loaded by name are frozen: call eval(), or train with the "
                "model's own units, set_adapter('default')"
            )
        if batch.unit_locations is not None or subspaces is not None:
            name = "subspaces" if batch.unit_locations is None else "unit_locations"
            raise ValueError(f"{name} are of the model's own units: leave them out")
        names = [active] * batch.rows if adapter_names is None else adapter_names
        planner = self.adapters.planner(names, batch.rows)
        if self.reft_config.peft and not all(names):
            raise ValueError(
                "adapter_names has None, but the peft section acts on every row, so none is the "
                "bare base: use `with model.disabled():`"
            )
        return planner

    @property
    def arithmetic(self) -> Arithmetic:
        """The dtype in which low-rank edits are computed: `"wide"` or `"base"`.

        `"wide"` is the wider of the weights' dtype and the hidden states', so fp32 beside a base in
        bf16. `"base"` is the hidden states' dtype: it leaves out the casts of each site, and rounds
        what an edit computes to that dtype, as the base's own layers round. Units with an `edit` or
        `forward` of their own, and units that FSDP2 shards, are always `"wide"`.
        """
        return self.engine.settings.now.arithmetic

    @arithmetic.setter
    def arithmetic(self, choice: Arithmetic) -> None:
        if choice not in get_args(Arithmetic):
            raise ValueError(f"arithmetic {choice!r}: expected 'wide' or 'base'")
        self.engine.settings.set("arithmetic", choice)

    @contextlib.contextmanager
    def _bare(self) -> Iterator[PreTrainedModel]:
        base = inner_model(self.model)
        has_peft = self.reft_config.peft is not None
        with exclusive(base), undone_in_children() as stack:
            stack.enter_context(innermost(base))
            if has_peft:
                stack.enter_context(without_peft(self.model))
            yield base if has_peft else self.model

    def _call(self, base: Any, inputs: dict[str, Any], return_logits: Logits = None) -> Any:
        if not inputs.get("fused_lm_head") or self._fused_forward is None:
            outputs = base(**inputs)
            return at_labels(outputs, inputs) if return_logits == "labels" else outputs
        return call_fused(base, self._fused_forward, inputs)

    @property
    def labels_end_prompts(self) -> bool:
        """Whether labels are what the base writes after a prompt, so that they tell its end."""
        return self._planner.labels_end_prompts


if torch.__version__ < "2.8":  # which cannot trace our passes, nor many models of transformers
    ReftModel.forward = torch.compiler.disable(ReftModel.forward)  # type: ignore[method-assign,no-untyped-call]  # torch's


def get_reft_model(
    model: PreTrainedModel,
    reft_config: ReftConfig | None = None,
    set_device: bool = True,
    disable_model_grads: bool = True,
) -> ReftModel:
    """Wrap a transformers model with the units of a config.

    Args:
        model: the base.
        reft_config: the units; None for the bare base, to load adapters by name.
        set_device: put the units on the devices of their sites.
        disable_model_grads: freeze the base.

    Raises:
        ValueError: the config does not fit the base.
    """
    if isinstance(model, ReftConfig):
        raise ValueError("the arguments are swapped: get_reft_model(model, reft_config)")
    if reft_config is None:
        reft_config = ReftConfig([])
    if not isinstance(reft_config, ReftConfig):
        raise ValueError(f"reft_config: expected a ReftConfig, got {brief(reft_config)}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a model of transformers, got {brief(model)}")
    reft_model = ReftModel(reft_config, model)
    if set_device:
        reft_model.set_device(None)
    if disable_model_grads:
        reft_model.disable_model_gradients()
    return reft_model
