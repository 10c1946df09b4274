"""Run one pass of a base with its units in the cheapest way that gives the base's own loss.

| way | when |
|---|---|
| the base's own forward | there are no labels, the caller wants all logits, or torch.compile \
traces: shapes that depend on labels would break its graph |
| loss at label positions | labels are one per token, and the base's loss is the usual one |
| split | besides, the base is frozen and much of the batch comes before the first edit |
| split, prompts from a cache | besides, prompts meet neither noise nor dropout |

Whether a base allows them is found out on the base itself, once, with eight tokens.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import ModelOutput

from ...interventions import NoiseIntervention
from ..base.peft import inner_model, may_add_to_loss, virtual_tokens
from ..base.quantization import check_gradients
from ..base.running import (
    checkpointed_modules,
    exclusive,
    has_foreign_hooks,
    innermost,
    is_watched,
    weights_stamp,
)
from ..base.sharding import is_spread
from ..base.sites import takes_position_ids
from ..calls import Pass
from ..hooks import Engine
from ..layout import has_token_labels
from ..tracing import Tracer
from .loss import Tail, label_loss, targets_of, with_lazy_logits, without_logits
from .prefix_cache import Complete, PrefixCache, PromptStates, pack, unpack
from .probe import Abilities, probe
from .split import PER_TOKEN, Alignment, align, aligned_inputs
from .symnoise import first_of_pairs

logger = logging.getLogger(__name__)

SplitMode = Literal["auto", "always", "never"]

Decoded = tuple[ModelOutput, Tensor, Callable[[], Tensor]]
"""The base's output, the hidden states that predict labels, and a way to all hidden states."""

_SPLIT_INPUTS = {*PER_TOKEN, "attention_mask", "labels", "num_items_in_batch"}
_LABEL_INPUTS = _SPLIT_INPUTS | {"use_cache", "output_hidden_states", "output_attentions"}
_LABEL_INPUTS |= {"token_type_ids", "return_dict"}


class Runner:
    """Runs passes of an engine, each in the cheapest way.

    Args:
        engine: the base with its units.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._tracer = engine, Tracer(engine)
        self._logged: set[tuple[str, str]] = set()
        self._known: dict[tuple[object, ...], Abilities] = {}
        self._is_checked = False

    def run(
        self,
        passes: Sequence[Pass],
        inputs: dict[str, Any],
        *,
        pairs: int | None = None,
        return_logits: bool | None = None,
        split: SplitMode = "auto",
        prefix_cache: PrefixCache | None = None,
    ) -> Any:
        """One call of the base; returns its output class with its loss.

        Args:
            passes: the edits of each stack.
            inputs: of the base.
            pairs: for a batch that holds each of so many examples twice, return the first half.
            return_logits: True has the base compute all; False leaves them out where they are not
                needed for the loss; None computes them when somebody reads them.
            split: whether to run what comes before the first edit without gradients; `"auto"`
                where it is possible and saves time.
            prefix_cache: where keys and values of prompts are kept from epoch to epoch.

        Raises:
            ValueError: `split="always"`, but a training pass cannot be split; or gradients do not
                pass a quantised base.
        """
        current = passes[0]
        if torch.compiler.is_compiling():
            outputs = self._tracer.run(current, inputs)
            return outputs if pairs is None else first_of_pairs(outputs, pairs)
        if torch.is_grad_enabled() and not self._is_checked:
            check_gradients(self._engine.base)
            self._is_checked = True
        whole, alignment = self._plan(current, inputs, return_logits, split)
        trained = (parameter.requires_grad for parameter in self._engine.base.parameters())
        if prefix_cache is not None and alignment is None and any(trained):
            prefix_cache.clear()  # fused optimizers change weights without a trace
        if whole:
            with self._engine.running(*passes):
                outputs = self._engine.base(**inputs)
            return outputs if pairs is None else first_of_pairs(outputs, pairs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        targets = targets_of(inputs.pop("labels"))
        num_items = inputs.pop("num_items_in_batch", None)
        if alignment is None:
            outputs, hidden, all_hidden = self._unsplit(current, inputs)
        else:
            outputs, hidden, all_hidden = self._split(
                current, inputs, alignment, prefix_cache, to_end=return_logits is not False
            )
            targets = alignment.take(targets, -100)[:, alignment.cut :]
        tail = Tail(inner_model(self._engine.base), self._abilities.decoder_output)
        loss = label_loss(tail, hidden, targets, num_items)
        kept = {n: v for n, v in outputs.items() if n not in ("loss", "logits")}
        outputs = type(outputs)(loss=loss, **kept)
        if pairs is not None:
            outputs = first_of_pairs(outputs, pairs)
        if return_logits is False:
            return outputs
        device = hidden.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

        def logits() -> Tensor:
            with autocast:  # also if they are read after its block
                return tail.logits(all_hidden()[:pairs])

        return with_lazy_logits(outputs, logits)

    def _plan(
        self,
        current: Pass,
        inputs: Mapping[str, Any],
        return_logits: bool | None,
        split: SplitMode,
    ) -> tuple[bool, Alignment | None]:
        """Whether the base computes all logits, and where to split the pass."""
        whole = next(self._against_label_loss(current, inputs, return_logits), None)
        plain = whole or next(self._against_split(inputs), None)
        alignment = None
        if plain is None and split != "never":
            assert current.layout is not None
            alignment = align(
                current.layout,
                current.selections.values(),
                inputs["labels"],
                inputs.get("position_ids"),
                keep_end=return_logits is not False,
            )
            if alignment is None:
                plain = "rows are packed, or have labels at or right after padding"
            elif not self._takes_position_ids and alignment.shift.any():
                plain = "prompts end at different columns, and the base takes no position_ids"
            elif alignment.cut == 0:
                plain = "nothing comes before the first edit"
            elif split == "auto" and not alignment.is_worthwhile:
                plain = "it would save less than a twentieth of the pass"
            else:
                plain = next(self._against_split_of_base(), None)
        is_training = any(one.unit.training for one in self._engine.units)
        if is_training and torch.is_grad_enabled():
            if split == "always" and plain is not None:
                raise ValueError(f"split 'always': {plain}")
            self._log("all logits are computed", whole)
            self._log("a training pass is not split", plain)
        if plain is not None:
            alignment = None
        return whole is not None, alignment

    # -- the ways ------------------------------------------------------------------------------

    def _unsplit(self, current: Pass, inputs: dict[str, Any]) -> Decoded:
        base = self._engine.base
        decoder = inner_model(base).base_model
        with self._engine.running(current) as is_ours, without_logits(decoder, is_ours) as seen:
            outputs = base(**inputs)
        return outputs, seen[-1], lambda: seen[-1]

    def _split(
        self,
        current: Pass,
        inputs: dict[str, Any],
        alignment: Alignment,
        prefix_cache: PrefixCache | None,
        *,
        to_end: bool,
    ) -> Decoded:
        assert current.layout is not None
        base, cut = self._engine.base, alignment.cut
        decoder = inner_model(base).base_model
        moved = {id(s): alignment.select(s) for s in current.selections.values() if s is not None}
        selections = {k: s and moved[id(s)] for k, s in current.selections.items()}
        layout = current.layout
        current = replace(current, selections=selections, alignment=alignment)
        aligned = aligned_inputs(alignment, inputs, layout, position_ids=self._takes_position_ids)
        prompt = {name: value[:, :cut] for name, value in aligned.items()}
        rest = {name: value[:, cut:] for name, value in aligned.items()}
        rest["attention_mask"] = aligned["attention_mask"]
        if prefix_cache is not None and (why := next(self._against_reuse(inputs), None)):
            self._log("prompts are not kept from epoch to epoch", why)
            prefix_cache = None
        stamp: tuple[object, ...] = ()
        last = None if to_end or not self._may_stop() else self._abilities.last_cached
        with self._engine.running(current) as is_ours, without_logits(decoder, is_ours) as seen:
            if prefix_cache is None:
                states = self._prefill(prompt, last)
            else:
                with prefix_cache.lock:
                    states = self._reused(prompt, last, alignment, prefix_cache)
                stamp = prefix_cache.stamp
            outputs = base(**rest, past_key_values=states, use_cache=True)
        hidden = seen[-1]

        def all_hidden() -> Tensor:
            before = seen[0]
            if len(seen) == 1 or len(before) < len(hidden):  # some came from the prefix cache
                if stamp != self._stamp():
                    raise RuntimeError("the base has changed since these logits' forward pass")
                with (
                    self._engine.running(current) as is_ours,
                    without_logits(decoder, is_ours) as s,
                ):
                    self._prefill(prompt)
                before = s[0]
            return alignment.put_back(torch.cat([before, hidden], 1))

        kept = {name: value for name, value in outputs.items() if name != "past_key_values"}
        return type(outputs)(**kept), hidden, all_hidden

    def _may_stop(self) -> bool:
        """Whether nobody waits for the end of a layer's forward pass."""
        return not any(
            has_foreign_hooks(module) or hasattr(module, "_hf_hook")
            for module in self._engine.base.modules()
        )

    @torch.no_grad()
    def _prefill(self, prompt: Mapping[str, Tensor], last: int | None = None) -> PromptStates:
        states = PromptStates(last)
        with contextlib.suppress(Complete):
            self._engine.base(**prompt, past_key_values=states, use_cache=True)
        return states

    @torch.no_grad()
    def _reused(
        self,
        prompt: Mapping[str, Tensor],
        last: int | None,
        alignment: Alignment,
        prefixes: PrefixCache,
    ) -> PromptStates:
        """Keys and values of prompts from the cache, and of those that it lacks from the base."""
        inside = alignment.inside[:, : alignment.cut]
        prefixes.belongs_to(self._stamp())
        columns = torch.stack(
            [
                prompt["input_ids"],
                prompt.get("position_ids", alignment.columns[:, : alignment.cut]),
                prompt["attention_mask"],
            ],
            dim=2,
        ).cpu()
        names = [
            row[kept].numpy().tobytes() for row, kept in zip(columns, inside.cpu(), strict=True)
        ]
        lengths = inside.sum(1).tolist()
        missing = [row for row, name in enumerate(names) if name not in prefixes]
        prefixes.hits += len(names) - len(missing)
        prefixes.misses += len(missing)
        if len(missing) == len(names):
            states = self._prefill(prompt, last)
            values, prefixes.shapes = pack(states)
        else:
            device = prompt["input_ids"].device
            values = prefixes.stacked(names, lengths, alignment.cut).to(device)
            if missing:
                lacking = torch.tensor(missing, device=device)
                states = self._prefill({n: v[lacking] for n, v in prompt.items()}, last)
                values[lacking], prefixes.shapes = pack(states)
            states = unpack(values, prefixes.shapes)
        for row, kept in zip(missing, values[missing].cpu(), strict=True):
            prefixes.write(names[row], kept[alignment.cut - lengths[row] :])
        return states

    # -- which of them -------------------------------------------------------------------------

    @property
    def _abilities(self) -> Abilities:
        base = inner_model(self._engine.base)
        key = (type(base), getattr(base.config, "output_router_logits", None))
        if key not in self._known:
            with exclusive(base), innermost(base):
                found = self._known[key] = probe(base)
            for reason in {found.no_tail, found.no_prefill} - {None}:
                logger.warning("training runs plain passes: %s", reason)
        return self._known[key]

    @cached_property
    def _takes_position_ids(self) -> bool:
        return takes_position_ids(inner_model(self._engine.base))

    def _against_label_loss(  # noqa: PLR0912  # a list of reasons
        self, current: Pass, inputs: Mapping[str, Any], return_logits: bool | None
    ) -> Iterator[str]:
        """Reasons to leave the loss to the base."""
        base, labels = self._engine.base, inputs.get("labels")
        if current.layout is None:
            yield "the base tells the length of its sequences only when it runs"
            return
        inner = inner_model(base)
        decoder = inner.base_model
        heads = [child for child in inner.children() if decoder not in (child, inner)]
        tail = [module for head in heads for module in head.modules()]
        if labels is None:
            yield "there are no labels"
        if return_logits:
            yield "return_logits is True"
        is_continued = inputs.get("past_key_values") is not None
        if is_continued or not has_token_labels(inputs["labels"], current.layout.attended):
            yield "labels are not one per token"
        if unknown := given(inputs) - _LABEL_INPUTS:
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
        if any(is_watched(module) for module in [inner, *tail]):
            yield "a hook of others reads the head"
        if any(one.site.module in {inner, decoder, *tail} for one in self._engine.units):
            yield "a unit edits the head"
        if self._abilities.no_tail is not None:
            yield self._abilities.no_tail

    def _against_split(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Reasons in the inputs not to run the prompt without gradients."""
        if not torch.is_grad_enabled():
            yield "no gradients are taken"
        if any(isinstance(v, Tensor) and v.requires_grad for v in inputs.values()):
            yield "an input requires a gradient"
        if unknown := given(inputs) - _SPLIT_INPUTS:
            yield f"{', '.join(sorted(unknown))} concern the whole batch"
        config = inner_model(self._engine.base).config
        if config.output_hidden_states or config.output_attentions:
            yield "the base's config asks for what it computes in between"
        position_ids = inputs.get("position_ids")
        if position_ids is not None and position_ids.shape != inputs["labels"].shape:
            yield "position_ids are not one per token"

    def _against_split_of_base(self) -> Iterator[str]:
        """Reasons in the base, which take a walk through it to find."""
        base = self._engine.base
        if any(parameter.requires_grad for parameter in base.parameters()):
            yield "parameters of the base are trained"
        if checkpointed_modules(base):
            yield "gradient checkpointing takes no cache"
        if any(is_watched(module) for module in base.modules()):
            yield "a hook of others reads the base"
        if self._abilities.no_prefill is not None:
            yield self._abilities.no_prefill

    def _against_reuse(self, inputs: Mapping[str, Any]) -> Iterator[str]:
        """Reasons why keys and values of prompts differ from epoch to epoch."""
        base = self._engine.base
        if "input_ids" not in inputs:
            yield "inputs are not token ids"
        if base is not inner_model(base) or getattr(base, "_hf_peft_config_loaded", False):
            yield "adapters of PEFT may be switched"
        noises = [o.unit for o in self._engine.units if isinstance(o.unit, NoiseIntervention)]
        if any(n.training and getattr(n, "where", "all") != "completion" for n in noises):
            yield "prompts are noised"
        if is_random(base):
            yield "the base drops out, or jitters"

    def _stamp(self) -> tuple[object, ...]:
        """What keys and values depend on, beside tokens."""
        base = self._engine.base
        device = base.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (*weights_stamp(base), cast)

    def _log(self, what: str, why: str | None) -> None:
        if why is not None and (what, why) not in self._logged:
            self._logged.add((what, why))
            logger.info("%s: %s", what, why)


def given(inputs: Mapping[str, Any]) -> set[str]:
    """Names of the inputs that are not None."""
    return {name for name, value in inputs.items() if value is not None}


def is_random(base: nn.Module) -> bool:
    """Whether the base draws numbers now: for dropout or jitter, in a module or by a rate."""
    for module in base.modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                return True
    return False
