"""`ReftModel`: a frozen base model with its units; called and generating like the base."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import saving
from .config import ReftConfig
from .engine import Engine, Pass, cached_length, inner_model, innermost
from .pairs import in_pairs
from .passes import Runner, SplitMode
from .placement import place_units
from .positions import (
    PromptLayout,
    UnitLocations,
    checked_lengths,
    explicit_selection,
    has_token_labels,
    parse_unit_locations,
    prompt_lengths_from_labels,
)
from .prefix_cache import PrefixCache
from .quantised import keep_differentiable


class ReftModel(nn.Module):
    """A base model whose hidden states are edited, and perturbed in training, by units.

    It is called like the base and returns the base's output class; `generate` returns token ids.
    Attributes that it does not have itself (`config`, `device`, `generation_config`,
    `gradient_checkpointing_enable`, …) are the base's.

    Args:
        config: the units.
        model: the base, a transformers model. Its weights are neither copied nor changed.

    Raises:
        ValueError: an entry does not fit the base: layer, width, rank or overlapping positions.
    """

    _hf_peft_config_loaded = True
    """transformers' Trainer takes quantised models that say so: units are what it trains on them."""

    def __init__(self, config: ReftConfig, model: PreTrainedModel) -> None:
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model: which of its two sequences "
                "positions would count is not defined yet"
            )
        if isinstance(model, ReftModel):
            raise ValueError("the model is a ReftModel already: put all units into one ReftConfig")
        if type(model).__name__ == "OptimizedModule":
            raise ValueError(
                "the model is compiled: give the model itself, then torch.compile(reft_model)"
            )
        self.model: PreTrainedModel = model
        self.reft_config = config
        keep_differentiable(model)
        placed = place_units(config, model)
        self.interventions = nn.ModuleDict({one.key: one.unit for one in placed})
        self._split: SplitMode = "auto"
        self.prefix_cache: PrefixCache | None = None
        self._engine = Engine(model, placed)
        self._runner = Runner(self._engine)
        self._is_disabled = False
        self.interventions.train(model.training)
        self.training = model.training
        self.register_state_dict_post_hook(saving.keep_trained)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_post_hook(saving.expect_trained)  # type: ignore[no-untyped-call]  # torch's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("config", "generation_config"):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    # -- forward -----------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        unit_locations: UnitLocations | None = None,
        output_original_output: bool = False,
        return_logits: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """One pass of the base with the units applied.

        Args:
            input_ids: token ids; or, in pyreft's form, a mapping of all inputs. The result is then
                `(base_output or None, intervened_output)`.
            attention_mask: 1 at tokens, 0 at padding, on either side.
            labels: as the base takes them.
            prompt_lengths: attended tokens in each row's prompt. By default the prompt ends before
                the first label that is not -100, and is the whole input where there are no labels.
                With a filled cache and no such information, all that is cached is the prompt.
            unit_locations: `{"sources->base": (None, locations)}` with columns nested as
                interventions × batch × positions, instead of the config's positions.
            output_original_output: in pyreft's form, also run the bare base.
            return_logits: with labels, logits that the loss does not need are computed when they
                are read; True computes them in the base's own forward, False leaves them out. In
                training with SymNoise they are those of the +δ rows.
            inputs: the base's other arguments.

        Raises:
            ValueError: masks, locations or widths that do not fit the input; SymNoise in training
                without labels; `split = "always"` where a pass cannot be split.
        """
        given = {"attention_mask": attention_mask, "labels": labels}
        given["prompt_lengths"] = prompt_lengths
        inputs.update({name: value for name, value in given.items() if value is not None})
        if isinstance(input_ids, Mapping):
            batch = {**input_ids, **inputs}
            original = None
            if output_original_output:
                with self.disabled():
                    original = self(**batch)
            batch.setdefault("return_logits", return_logits)
            return original, self(**batch, unit_locations=unit_locations)
        prompt_lengths = inputs.pop("prompt_lengths", None)
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if self._is_disabled:
            with innermost(inner_model(self.model)):
                return self.model(**inputs)
        if self._engine.base is not self.model:
            raise ValueError(
                "the base was replaced. nn.DataParallel copies it: start one process per device; "
                "so does accelerate's regional compilation: compile the base's layers, or the "
                "whole ReftModel"
            )
        width, batch_size = _width_and_batch(inputs)
        doubled = self.training and any(
            getattr(one.unit, "paired", False) for one in self._engine.units
        )
        if doubled:
            inputs = in_pairs(inputs, batch_size)
            prompt_lengths = None if prompt_lengths is None else prompt_lengths.repeat(2)
        layout = self._layout(inputs, prompt_lengths)
        current = self._pass(layout, unit_locations, batch_size, width)
        return self._runner.run(
            current,
            inputs,
            pairs=batch_size if doubled else None,
            return_logits=return_logits,
            split=self._split,
            prefix_cache=self.prefix_cache,
        )

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        unit_locations: UnitLocations | None = None,
        intervene_on_prompt: bool = True,
        output_original_output: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate with the base's own `generate`; the input is the prompt.

        Args:
            inputs: token ids; or, in pyreft's form, a mapping of all inputs. The result is then
                `(base_output or None, intervened_output)`.
            generation_config: as the base's `generate` takes it.
            unit_locations: as in `forward`.
            intervene_on_prompt: pyreft's flag; only True is meaningful here.
            output_original_output: in pyreft's form, also generate with the bare base.
            kwargs: as the base's `generate` takes them.

        Raises:
            ValueError: as in `forward`, or `intervene_on_prompt=False`.
        """
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        if not intervene_on_prompt:
            raise ValueError(
                "intervene_on_prompt False: to edit generated tokens, give the config "
                "positions 'decode' or 'all+decode'"
            )
        if isinstance(inputs, Mapping):
            batch = dict(inputs) | kwargs
            original = None
            if output_original_output:
                with self.disabled():
                    original = self.generate(**batch)
            return original, self.generate(**batch, unit_locations=unit_locations)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        kwargs.pop("prompt_lengths", None)  # of a collated batch: here the input is the prompt
        if self._is_disabled:
            with innermost(inner_model(self.model)):
                return self.model.generate(**kwargs)
        width, batch_size = _width_and_batch(kwargs)
        if kwargs.get("attention_mask") is None and kwargs.get("input_ids") is not None:
            mask = self._infer_attention_mask(kwargs)
            if mask is not None:
                kwargs["attention_mask"] = mask
        attended = _attended(kwargs, width, batch_size)
        current = self._pass(PromptLayout(attended), unit_locations, batch_size, width)
        current.is_generation = True
        drafts = ("assistant_model", "assistant_early_exit")
        settings = kwargs.get("generation_config")
        current.is_assisted = any(
            kwargs.get(name, getattr(settings, name, None)) is not None for name in drafts
        )
        with self._engine.running(current):
            return self.model.generate(**kwargs)

    @property
    def split(self) -> SplitMode:
        """Whether training runs what comes before the first edit without gradients.

        `"auto"` where that is possible and saves time, `"always"` or an error that says why not,
        or `"never"`. `prefix_cache`, a `PrefixCache` or None, keeps its results for later epochs.
        """
        return self._split

    @split.setter
    def split(self, mode: SplitMode) -> None:
        if mode not in get_args(SplitMode):
            raise ValueError(f"split {mode!r}: expected 'auto', 'always' or 'never'")
        self._split = mode

    @contextlib.contextmanager
    def disabled(self) -> Iterator["ReftModel"]:
        """Within the block, the model is its bare base."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield self
        finally:
            self._is_disabled = before

    def _layout(self, inputs: Mapping[str, Any], lengths: Tensor | None) -> PromptLayout:
        width, batch_size = _width_and_batch(inputs)
        past = cached_length(inputs.get("past_key_values"))
        attended = _attended(inputs, past + width, batch_size)
        labels = inputs.get("labels")
        if lengths is not None:
            lengths = checked_lengths(lengths, attended)
        elif labels is not None and has_token_labels(labels, attended):
            lengths = prompt_lengths_from_labels(labels, attended)
        elif past:
            lengths = attended[:, :past].sum(1)
        return PromptLayout(attended, lengths)

    def _pass(
        self, layout: PromptLayout, unit_locations: UnitLocations | None, batch: int, width: int
    ) -> Pass:
        units = [one for one in self._engine.units if one.positions is not None]
        if unit_locations is not None:
            times = layout.attended.shape[0] // batch
            found = parse_unit_locations(unit_locations, len(units), batch, width)
            chosen = [
                None if c is None else explicit_selection(c.to(self.device).repeat(times, 1))
                for c in found
            ]
            return Pass(layout, {o.key: c for o, c in zip(units, chosen, strict=True)})
        # Sites with equal positions share one selection, hence one computation of row indices.
        select: Any = layout.select
        if not torch.compiler.is_compiling():  # whose graph has equal operations once anyway
            select = functools.cache(select)
        return Pass(layout, {o.key: select(o.positions, o.prefix, o.suffix) for o in units})

    def _infer_attention_mask(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The mask that `generate` would infer from padding, so that both see the same one."""
        given, own = kwargs.get("generation_config"), self.model.generation_config

        def setting(name: str) -> Any:  # transformers fills what a given config leaves open
            values = (kwargs.get(name), getattr(given, name, None), getattr(own, name, None))
            return next((value for value in values if value is not None), None)

        pad, eos = setting("pad_token_id"), setting("eos_token_id")
        ends = torch.as_tensor(-1 if eos is None else eos).flatten().tolist()
        if pad is None or pad in ends or kwargs["input_ids"].is_floating_point():
            return None
        return kwargs["input_ids"].ne(pad).long()

    # -- what the ecosystem asks a model for ---------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base takes `num_items_in_batch`, as transformers' Trainer determines it."""
        accepts = getattr(self.model, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(self.model.forward).parameters.values()
            accepts = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return bool(accepts)

    def set_device(self, device: torch.device | str | None, set_model: bool = True) -> None:
        """Move everything to `device`; None puts each unit where its site is."""
        if device is not None:
            (self if set_model else self.interventions).to(device)
            return
        for one in self._engine.units:
            found = next((p.device for p in one.site.module.parameters()), self.model.device)
            if found.type == "meta":  # offloaded: the weights come when the module runs
                found = getattr(
                    getattr(one.site.module, "_hf_hook", None), "execution_device", None
                )
            one.unit.to(found or "cpu")

    def disable_model_gradients(self) -> None:
        """Freeze the base."""
        self.model.requires_grad_(False)

    def count_parameters(self) -> tuple[int, int, int]:
        """Trainable parameters of the units and of the base, and all of the base."""
        return (
            sum(p.numel() for p in self.interventions.parameters() if p.requires_grad),
            sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            sum(p.numel() for p in self.model.parameters()),
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, and their share of the base's."""
        units, base, total = self.count_parameters()
        print(
            f"trainable intervention params: {units:,d} || trainable model params: {base:,d}\n"
            f"model params: {total:,d} || trainable%: {100 * (units + base) / total:.4f}"
        )

    # -- saving ----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write the adapter: the units and what is trained of the base (see `saving`).

        Args:
            save_directory: created if needed.
            state_dict: tensors to write instead of the model's own, when these are sharded.
            is_main_process: whether this process is the one that writes.
        """
        if is_main_process:
            saving.save_adapter(self, save_directory, state_dict)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the adapter directory; arguments as in `huggingface_hub`. Returns its address."""
        return saving.upload_adapter(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def save(
        self,
        save_directory: str | Path,
        save_to_hf_hub: bool = False,
        hf_repo_name: str | None = None,
    ) -> None:
        """pyreft's name for `save_pretrained`, and `push_to_hub` if asked."""
        self.save_pretrained(save_directory)
        if save_to_hf_hub:
            if hf_repo_name is None:
                raise ValueError("save_to_hf_hub needs hf_repo_name, such as 'user/adapter'")
            self.push_to_hub(hf_repo_name)

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, directory: str | Path) -> "ReftModel":
        """Wrap `model` with the adapter of a directory or a hub repository, in evaluation mode."""
        return saving.load_adapter(model, directory)

    @classmethod
    def load(
        cls,
        load_directory: str | Path,
        model: PreTrainedModel,
        from_huggingface_hub: bool = False,  # noqa: ARG003  # found out from the name
    ) -> "ReftModel":
        """pyreft's name and order of arguments for `from_pretrained`."""
        return cls.from_pretrained(model, load_directory)


if torch.__version__ < "2.7":  # its dynamo can trace neither the models of transformers nor us
    ReftModel.forward = torch.compiler.disable(ReftModel.forward)  # type: ignore[method-assign]


def get_reft_model(
    model: PreTrainedModel,
    reft_config: ReftConfig,
    set_device: bool = True,
    disable_model_grads: bool = True,
) -> ReftModel:
    """Wrap a transformers model with the units of a config.

    Args:
        model: the base.
        reft_config: the units.
        set_device: put the units on the devices of their sites.
        disable_model_grads: freeze the base.

    Raises:
        ValueError: the config does not fit the base.
    """
    if not isinstance(reft_config, ReftConfig):
        raise ValueError(f"reft_config: expected a ReftConfig, got {reft_config!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a model of transformers, got {model!r}")
    reft_model = ReftModel(reft_config, model)
    if set_device:
        reft_model.set_device(None)
    if disable_model_grads:
        reft_model.disable_model_gradients()
    return reft_model


def _width_and_batch(inputs: Mapping[str, Any]) -> tuple[int, int]:
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("expected input_ids or inputs_embeds")
    return tokens.shape[1], tokens.shape[0]


def _attended(inputs: Mapping[str, Any], width: int, batch: int) -> Bool[Tensor, "batch width"]:
    mask = inputs.get("attention_mask")
    if mask is None:
        tokens = inputs.get("input_ids")
        device = (inputs["inputs_embeds"] if tokens is None else tokens).device
        return torch.ones(batch, width, dtype=torch.bool, device=device)
    if mask.shape != (batch, width):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: expected ({batch}, {width}), one entry "
            "per token, cached ones included"
        )
    return mask.bool()
