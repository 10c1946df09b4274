"""Run one pass of a base with its units in the cheapest way that gives the base's own loss.

| way | when |
|---|---|
| the base's own forward | there are no labels, the caller wants all logits, or torch.compile \
traces: shapes that depend on labels would break its graph |
| loss at label positions | labels are one per token, and the base's loss is the usual one |
| split | the same, and the base is frozen and much of the batch comes before the first edit |
| split, prompts from a cache | the same, and prompts meet neither noise nor dropout |

A test with eight tokens, once, shows on the base itself whether it allows them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput

from ...interventions import AddsLoss, NoiseIntervention, gate_of
from ..base.peft import has_switched_adapters, inner_model, may_add_to_loss, virtual_tokens
from ..base.running import (
    checkpointed_modules,
    exclusive,
    innermost,
    is_awaited,
    is_spread,
    is_transformed,
    is_watched,
    modules_of,
    parameters_of,
)
from ..base.sites import takes_position_ids
from ..calls import EditPlan, Plan
from ..hooks import Engine
from ..layout import Batch, has_token_labels
from .added_loss import AddedLoss, share_of_step, shifts_labels, with_added_loss
from .consistency import divergence_of_logits, pair_loss
from .loss import (
    Head,
    at_labels,
    label_loss,
    logits_of,
    loss_and_logits,
    targets_of,
    with_lazy_logits,
    without_logits,
)
from .pairs import first_of_pairs
from .prefix_cache import PrefixCache
from .probe import Abilities, check_gradients, is_random, probe
from .split import PER_TOKEN, Alignment, SplitPass, align
from .tracing import Tracer

logger = logging.getLogger(__name__)

SplitMode = Literal["auto", "always", "never"]

Logits = bool | Literal["labels"] | None
"""Which logits a caller wants: all, none, those that predict labels, or all once they are read."""

Decoded = tuple[ModelOutput, Tensor, Callable[[], Tensor]]
"""The base's output, the hidden states that predict labels, and a way to all hidden states."""

_SPLIT_INPUTS = {*PER_TOKEN, "attention_mask", "labels", "num_items_in_batch"}
_LABEL_INPUTS = _SPLIT_INPUTS | {"use_cache", "output_hidden_states", "output_attentions"}
_LABEL_INPUTS |= {"token_type_ids", "return_dict"}


class ForwardPasses:
    """Runs forward passes of an engine, each in the cheapest way."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._tracer, self.added = engine, Tracer(engine), AddedLoss()
        self._logged: set[tuple[str, str]] = set()
        self._known: dict[tuple[object, ...], Abilities] = {}
        self._randomness: tuple[tuple[bool, ...], bool] | None = None
        """Whether the base is random, and the modes of its modules at that test."""
        self._is_checked = False
        self._takes_position_ids = takes_position_ids(inner_model(engine.base))

    def run(
        self,
        plans: Sequence[Plan],
        batch: Batch,
        *,
        return_logits: Logits = None,
        split: SplitMode = "auto",
        prefix_cache: PrefixCache | None = None,
    ) -> Any:
        """One call of the base with the edits of each stack; returns its output class with a loss.

        Of a batch that holds each example twice, the outputs are those of the first half. The other
        arguments are as `ReftModel` has them.

        Raises:
            ValueError: `split="always"`, but a training pass cannot be split; or gradients do not
                pass a quantised base.
        """
        plan, rows = plans[0], batch.rows // batch.copies
        if torch.compiler.is_compiling():
            outputs = self._tracer.run(plan, batch)
            self._compare(outputs, plan, batch)
            outputs = self.with_added_loss(outputs, plan, batch)
            return outputs if batch.copies == 1 else first_of_pairs(outputs, rows)
        if torch.is_grad_enabled() and not self._is_checked and not is_transformed():
            check_gradients(self._engine.base)
            self._is_checked = True
        whole = next(self._against_label_loss(plan, batch, return_logits), None)
        alignment, plain = None, whole
        if isinstance(plan, EditPlan) and whole is None:
            alignment, plain = self._alignment(plan, batch, split, return_logits, prefix_cache)
        self._report(whole, plain, split)
        trained = (parameter.requires_grad for parameter in parameters_of(self._engine.base))
        if prefix_cache is not None and alignment is None and any(trained):
            prefix_cache.clear()  # fused optimizers change weights without a trace
        logits = None
        if whole is None and isinstance(plan, EditPlan):
            outputs, logits = self._with_label_loss(
                plan, batch, alignment, prefix_cache, return_logits
            )
        else:
            with self._engine.running(*plans):
                outputs = self._engine.base(**batch.inputs)
            self._compare(outputs, plan, batch)
        outputs = self.with_added_loss(outputs, plan, batch)
        if batch.copies > 1:
            outputs = first_of_pairs(outputs, rows)
        if logits is None and return_logits == "labels":
            labels = batch.inputs.get("labels")
            outputs = at_labels(outputs, {"labels": labels if labels is None else labels[:rows]})
        return outputs if logits is None else with_lazy_logits(outputs, logits)

    def _compare(self, outputs: Any, plan: Plan, batch: Batch) -> None:
        """Note how far the copies' predictions are apart, of the base's own logits."""
        if batch.compared is not None and batch.labels is not None:
            shifts = shifts_labels(inner_model(self._engine.base))
            apart = divergence_of_logits(logits_of(outputs), batch.labels, shifts=shifts)
            plan.notes.add(batch.compared, apart)

    def with_added_loss(self, outputs: Any, plan: Plan, batch: Batch) -> Any:
        """The outputs of a pass, with what the units add to their loss, if they have one."""
        plan.notes.warn_of_lost()
        units = [placed for placed in self._engine.units if isinstance(placed.unit, AddsLoss)]
        if not units or (added := self.added.of_pass(units, plan.notes)) is None:
            return outputs
        if batch.labels is not None:
            return with_added_loss(outputs, added, share_of_step(self._engine.base, batch.inputs))
        self.added.leave()
        return outputs

    # -- the ways ------------------------------------------------------------------------------

    def _with_label_loss(
        self,
        plan: EditPlan,
        batch: Batch,
        alignment: Alignment | None,
        prefix_cache: PrefixCache | None,
        return_logits: Logits,
    ) -> tuple[ModelOutput, Callable[[], Tensor] | None]:
        """A pass whose loss is computed at label positions, split where there is an alignment.

        Returns also what computes the logits that the caller wants.
        """
        to_end = return_logits is None
        inputs = {name: value for name, value in batch.inputs.items() if value is not None}
        targets = targets_of(inputs.pop("labels"))
        num_items = inputs.pop("num_items_in_batch", None)
        if alignment is None:
            outputs, hidden, all_hidden = self._unsplit(plan, inputs)
        else:
            outputs, hidden, all_hidden = self._split(plan, inputs, alignment, prefix_cache, to_end)
            targets = alignment.take(targets, -100)[:, alignment.cut :]
        head = Head(inner_model(self._engine.base), self._abilities.decoder_output)
        ready: Tensor | None = None
        if return_logits == "labels" and batch.copies == 1:
            loss, ready = loss_and_logits(head, hidden, targets, num_items)
        elif batch.compared is None:
            loss = label_loss(head, hidden, targets, num_items)
        else:
            loss, apart = pair_loss(head, hidden, targets, num_items)
            plan.notes.add(batch.compared, apart)
        kept = {n: v for n, v in outputs.items() if n not in ("loss", "logits")}
        outputs = type(outputs)(loss=loss, **kept)
        if return_logits is False:
            return outputs, None
        if ready is not None:
            return outputs, lambda: ready
        device, rows = hidden.device.type, batch.rows // batch.copies
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

        def logits() -> Tensor:
            with autocast:  # also if they are read after its block
                if to_end:
                    return head.logits(all_hidden()[:rows])
                return head.logits(hidden[:rows][targets[:rows] != -100][None])[0]

        return outputs, logits

    def _unsplit(self, plan: EditPlan, inputs: dict[str, Any]) -> Decoded:
        base = self._engine.base
        decoder = inner_model(base).base_model
        with self._engine.running(plan) as is_ours, without_logits(decoder, is_ours) as seen:
            outputs = base(**inputs)
        return outputs, seen[-1], lambda: seen[-1]

    def _split(
        self,
        plan: EditPlan,
        inputs: dict[str, Any],
        alignment: Alignment,
        prefix_cache: PrefixCache | None,
        to_end: bool,
    ) -> Decoded:
        if prefix_cache is not None and (why := next(self._against_reuse(inputs), None)):
            self._log("prompts are not kept from epoch to epoch", why)
            prefix_cache = None
        split = SplitPass(
            self._engine, plan, alignment, inputs, position_ids=self._takes_position_ids
        )
        # Hooks may wait for the end of a layer's forward pass.
        to_end = to_end or any(is_awaited(module) for module in modules_of(self._engine.base))
        last = None if to_end else self._abilities.last_cached
        outputs = split.run(last, prefix_cache)
        return outputs, split.hidden, split.all_hidden

    # -- which of them -------------------------------------------------------------------------

    def _alignment(
        self,
        plan: EditPlan,
        batch: Batch,
        split: SplitMode,
        return_logits: Logits,
        prefix_cache: PrefixCache | None,
    ) -> tuple[Alignment | None, str | None]:
        """Where to split a pass, or why not to; neither where it must not be."""
        keep_end = return_logits is None
        # Logits of prompts would compute again what the cache holds.
        is_kept = prefix_cache is not None and not keep_end
        reason = next(self._against_split(batch, is_kept), None)
        if reason is not None or split == "never":
            return None, reason
        position_ids = batch.inputs.get("position_ids")
        labels: Any = batch.labels  # not those of the inputs, which a copy may lack
        alignment = align(plan, labels, position_ids, keep_end=keep_end)
        reason = next(self._against_alignment(alignment, split), None)
        return (alignment, None) if reason is None else (None, reason)

    def _report(self, whole: str | None, plain: str | None, split: SplitMode) -> None:
        """Log why a training pass is not one of the cheaper ones, or raise where it has to be."""
        is_training = any(placed.unit.training for placed in self._engine.units)
        if is_training and torch.is_grad_enabled():
            if split == "always" and plain is not None:
                raise ValueError(f"split 'always': {plain}")
            self._log("all logits are computed", whole)
            self._log("a training pass is not split", plain)

    @property
    def _abilities(self) -> Abilities:
        base = inner_model(self._engine.base)
        key = (type(base), getattr(base.config, "output_router_logits", None))
        if key not in self._known:
            with exclusive(base), innermost(base):
                abilities = self._known[key] = probe(base)
            for reason in {abilities.no_head, abilities.no_prefill} - {None}:
                logger.warning("training runs plain passes: %s", reason)
        return self._known[key]

    def _against_label_loss(  # noqa: PLR0912  # a list of reasons
        self, plan: Plan, batch: Batch, return_logits: Logits
    ) -> Iterator[str]:
        """Reasons to leave the loss to the base."""
        base, inputs = self._engine.base, batch.inputs
        if not isinstance(plan, EditPlan):
            yield "the base tells the length of its sequences only when it runs"
            return
        inner = inner_model(base)
        if not hasattr(inner, "base_model"):
            yield "the base is no model of transformers"
            return
        decoder = inner.base_model
        heads = [child for child in inner.children() if decoder not in (child, inner)]
        after = [module for head in heads for module in head.modules()]
        if batch.labels is None:
            yield "there are no labels"
        if return_logits is True:
            yield "return_logits is True"
        if is_transformed():
            yield "a transform of torch.func runs"
            return
        is_continued = inputs.get("past_key_values") is not None
        if is_continued or not has_token_labels(batch.labels, plan.layout.attended):
            yield "labels are not one per token"
        if unknown := named(inputs) - _LABEL_INPUTS:
            yield f"{', '.join(sorted(unknown))} may change the loss"
        if inputs.get("return_dict", inner.config.return_dict) is False:
            yield "outputs are tuples"
        if virtual_tokens(base) or may_add_to_loss(base):
            yield "PEFT's method has virtual tokens, or adds to the loss"
        if inner.loss_function is not ForCausalLMLoss:
            yield "the base has a loss_function of its own"
        if "forward" in vars(inner):  # device maps and offloading do that
            yield "the base's forward was replaced on the instance"
        if is_spread(base):
            yield "the base is spread over processes"
        if any(is_watched(module) for module in [inner, *after]):
            yield "a foreign hook reads the head"
        if any(site.module in {inner, decoder, *after} for site in self._engine.sites):
            yield "a unit edits the head"
        if self._abilities.no_head is not None:
            yield self._abilities.no_head

    def _against_split(self, batch: Batch, is_kept: bool) -> Iterator[str]:
        """Reasons in the inputs not to run the prompt by itself, without gradients."""
        inputs = batch.inputs
        if not (torch.is_grad_enabled() or is_kept):
            yield "no gradients are taken, and prompts are not kept"
        if any(isinstance(v, Tensor) and v.requires_grad for v in inputs.values()):
            yield "an input requires a gradient"
        gates = (gate_of(placed.unit) for placed in self._engine.units)
        if any(gate is not None and gate.reads_prompts for gate in gates):
            yield "the gate of a unit reads whole prompts"
        if unknown := named(inputs) - _SPLIT_INPUTS:
            yield f"{', '.join(sorted(unknown))} concern the whole batch"
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            yield "attention_mask is not one entry per token"
        config = inner_model(self._engine.base).config
        if config.output_hidden_states or config.output_attentions:
            yield "the base's config asks for what it computes in between"
        position_ids = inputs.get("position_ids")
        if position_ids is not None and position_ids.shape != inputs["labels"].shape:
            yield "position_ids are not one per token"

    def _against_alignment(self, alignment: Alignment | None, split: SplitMode) -> Iterator[str]:
        """Reasons in the rows, and in the base, not to split where they are aligned."""
        if alignment is None:
            yield "rows are packed, or have labels at or right after padding"
            return
        if not self._takes_position_ids and alignment.shift.any():
            yield "prompts end at different columns, and the base takes no position_ids"
        if alignment.cut == 0:
            yield "nothing comes before the first edit"
        if split == "auto" and not alignment.is_worthwhile:
            yield "it would save less than a twentieth of the pass"
        base = self._engine.base  # last, since its reasons take a walk through it
        if any(parameter.requires_grad for parameter in parameters_of(base)):
            yield "parameters of the base are trained"
        if checkpointed_modules(base):
            yield "gradient checkpointing takes no cache"
        if any(is_watched(module) for module in modules_of(base)):
            yield "a foreign hook reads the base"
        if self._abilities.no_prefill is not None:
            yield self._abilities.no_prefill

    def _against_reuse(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Reasons why keys and values of prompts differ from epoch to epoch."""
        base = self._engine.base
        if "input_ids" not in inputs:
            yield "inputs are not token ids"
        if has_switched_adapters(base):
            yield "adapters of PEFT may be switched"
        units = [placed.unit for placed in self._engine.units]
        noises = [
            unit
            for unit in units
            if isinstance(unit, NoiseIntervention)
            and (unit.training or self._engine.settings.now.is_noised)
        ]
        if any(getattr(noise, "where", "all") != "completion" for noise in noises):
            yield "prompts are noised"
        if self._is_random():
            yield "the base drops out, or jitters"

    def _is_random(self) -> bool:
        """Whether the base is random; it is asked again when the mode of a module has changed."""
        base = self._engine.base
        modes = tuple(module.training for module in modules_of(base))
        if self._randomness is None or self._randomness[0] != modes:
            inner = inner_model(base)
            with exclusive(inner), innermost(inner):
                self._randomness = modes, is_random(inner)
        return self._randomness[1]

    def _log(self, what: str, why: str | None) -> None:
        if why is not None and (what, why) not in self._logged:
            self._logged.add((what, why))
            logger.info("%s: %s", what, why)


def named(inputs: Mapping[str, Any]) -> set[str]:
    """Names of the inputs that are not None."""
    return {name for name, value in inputs.items() if value is not None}
