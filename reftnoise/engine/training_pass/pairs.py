"""Every example twice in one batch: for SymNoise, with the loss of the pair's mean, and for noise
that compares the two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Batch
from ..units import PlacedUnit


def in_pairs_of(batch: Batch, paired: Sequence[PlacedUnit]) -> Batch:
    """Every example twice, for the units that ask for pairs.

    Raises:
        ValueError: as `in_pairs`; or a unit compares pairs, and another one asks for them, too.
    """
    compared = [placed for placed in paired if getattr(placed.unit, "compares", False)]
    if compared and len(paired) > 1:
        first, second = (type(placed.unit).__name__ for placed in paired[:2])
        raise ValueError(
            f"{first} and {second}: each asks for every example twice, in its own way: expected "
            "one such unit in a config"
        )
    if not compared:
        return in_pairs(batch)
    if batch.inputs.get("fused_lm_head"):
        raise ValueError(
            f"{type(compared[0].unit).__name__} compares predictions, which TRL's fused head does "
            "not return: leave one of them out"
        )
    has_decoder = compared[0].site.stack is not None
    if has_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch.inputs):
        # The base would make them of labels, of which the noisy rows have none.
        raise ValueError(
            f"{type(compared[0].unit).__name__} on an encoder-decoder model: expected "
            "decoder_input_ids next to the labels, such as "
            "model.prepare_decoder_input_ids_from_labels(labels)"
        )
    return _compared(batch, compared[0].key)


def ascend(unit: Any, run: Callable[[], Any]) -> None:
    """Let noise look, in a pass before the pass, where the predictions are least alike.

    Args:
        unit: noise that compares pairs; one without `ascending` is let be.
        run: such a pass.

    Raises:
        ValueError: torch.compile traces, or checkpoints are reentrant, neither of which takes a
            gradient within a pass.
    """
    if not hasattr(unit, "ascending"):
        return
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{type(unit).__name__} takes a gradient within the pass, which torch.compile of a "
            "ReftModel cannot trace: compile the layers, layer.compile()"
        )
    try:
        with torch.enable_grad(), unit.ascending():
            run()
    except RuntimeError as error:
        if "checkpoint" not in str(error):  # torch's, whose class says nothing more
            raise
        raise ValueError(
            f"{type(unit).__name__} takes a gradient within the pass, which gradient checkpointing "
            "refuses: set gradient_checkpointing_kwargs={'use_reentrant': False}"
        ) from error


def _compared(batch: Batch, key: str) -> Batch:
    """Every example twice, the second time without labels of its own, so that the loss stays."""
    pairs, labels = in_pairs(batch), batch.labels
    if labels is None or labels.is_floating_point():
        kind = "None" if labels is None else labels.dtype
        raise ValueError(f"labels of {kind}: expected integers, tokens or classes to compare")
    counted = torch.cat([labels, torch.full_like(labels, -100)])
    inputs = pairs.inputs | {"labels": counted}
    if batch.inputs.get("num_items_in_batch") is not None:
        inputs["num_items_in_batch"] = batch.inputs["num_items_in_batch"]
    return replace(pairs, inputs=inputs, compared=key)


def in_pairs(batch: Batch) -> Batch:
    """Every example twice, for SymNoise. The loss stays a mean: its divisor doubles too.

    Raises:
        ValueError: there are no labels.
    """
    inputs, rows = batch.inputs, batch.rows
    if batch.labels is None:
        raise ValueError(
            "the noise averages the loss over pairs, or compares them, so it needs labels while "
            "training (label smoothing and compute_loss_func take them away); call eval() for "
            "outputs without noise"
        )

    def twice(value: Any) -> Any:
        if isinstance(value, Mapping):  # masks, one for each kind of layer
            return {name: twice(part) for name, part in value.items()}
        has_rows = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
        return torch.cat([value, value]) if has_rows else value

    whole = ("num_items_in_batch", "logits_to_keep")
    doubled = {n: value if n in whole else twice(value) for n, value in inputs.items()}
    places = inputs.get("position_ids")
    if isinstance(places, Tensor) and places.dim() == 3:  # axes × rows × tokens, of images in text
        doubled["position_ids"] = torch.cat([places, places], 1)
    if inputs.get("num_items_in_batch") is not None:
        doubled["num_items_in_batch"] = 2 * inputs["num_items_in_batch"]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # ends of packed documents, of all rows in turn
        if inputs.get(name) is not None:
            ends = inputs[name]
            doubled[name] = torch.cat([ends, ends[-1] + ends[1:]])
    lengths = batch.prompt_lengths
    lengths = None if lengths is None else torch.as_tensor(lengths).repeat(2)
    return Batch.of(doubled, lengths, batch.unit_locations, copies=2)


def first_of_pairs(outputs: Any, rows: int) -> Any:
    """The outputs for the +δ rows, with the pair's loss: as many rows as the caller gave.

    A cache holds both, so it is left out.
    """
    return _join_pairs(outputs, rows, lambda plus, _: plus)


def mean_of_pairs(outputs: Any, rows: int) -> Any:
    """Each pair's mean, for callers that make their loss of log-probabilities: the pair's loss.

    What is no number, such as whether a token is the likeliest, is that of the +δ rows.
    """
    return _join_pairs(
        outputs,
        rows,
        lambda plus, minus: (plus + minus) / 2 if plus.is_floating_point() else plus,
    )


def _join_pairs(outputs: Any, rows: int, join: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def joined(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.dim() or value.shape[0] != 2 * rows:
                return value
            return join(value[:rows], value[rows:])
        if isinstance(value, tuple | list):
            return type(value)(joined(part) for part in value)
        return value

    if isinstance(outputs, Mapping):
        return type(outputs)(**{n: joined(v) for n, v in outputs.items() if n != "past_key_values"})
    return joined(outputs)
