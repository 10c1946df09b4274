"""The files of an export: a checkpoint of transformers, a LoRA of PEFT, a control vector."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...analysis.changed_passes import changing
from ...config.peft import import_peft
from ...engine.base.sites import find_layers
from ...engine.units import PlacedUnit
from ...model import ReftModel
from .folding import LinearEdit
from .plan import WeightPlan, acting_edits, refusal

CONTROL_VECTOR = "control-vector.gguf"
_DIRECTION = "direction."


def expect_no_trained_base(reft_model: ReftModel, to: str) -> None:
    """Raise a ValueError for what an adapter holds of its base, where a format has no place."""
    config = reft_model.reft_config
    for name in ("modules_to_save", "token_rows"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: the adapter holds weights of the base, for which {to} has no place; "
                "exact is --to merged"
            )


def write_merged(reft_model: ReftModel, tokenizer: Any, directory: Path) -> dict[str, Any]:
    """Write a checkpoint of transformers, with edits in its weights; the base is changed.

    Returns:
        What the record says of it.

    Raises:
        ValueError: an edit that no weights hold.
    """
    base = reft_model.model
    plan = WeightPlan(base, acting_edits(reft_model), as_lora=False)
    layers = {name: plan.folded(name) for name in plan.names}
    shifted = [n for n, layer in layers.items() if layer.shift.any() and _lacks_bias(layer.module)]
    flags = plan.flags_for(shifted)
    for name in plan.biased_by(flags):
        module = base.get_submodule(name)
        width = module.weight.shape[1] if hasattr(module, "nf") else module.weight.shape[0]
        if _lacks_bias(module):
            module.bias = nn.Parameter(module.weight.new_zeros(width), requires_grad=False)
    for flag in flags:
        setattr(base.config.get_text_config(), flag, True)
    for layer in layers.values():
        layer.write()
    base.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"edits": _described(plan), "config_flags": flags}


def _lacks_bias(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and module.bias is None


def read_merged(directory: Path, device: Any) -> Any:
    """The checkpoint, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model.to(device).eval()


def write_lora(reft_model: ReftModel, directory: Path) -> dict[str, Any]:
    """Write an adapter of PEFT, in float32; the base is wrapped.

    All layers have one rank, since some readers know no other; smaller ones are filled with zeros.
    Returns and raises as `write_merged`.
    """
    expect_no_trained_base(reft_model, "a LoRA")
    base, peft = reft_model.model, import_peft()
    if not (edits := acting_edits(reft_model)):
        raise ValueError("the adapter edits nothing, so there is no LoRA")
    plan = WeightPlan(base, edits, as_lora=True)
    layers = {name: plan.folded(name) for name in plan.names}
    factors = {name: layer.factors() for name, layer in layers.items()}
    rank = max([1, *(len(down) for _, down in factors.values())])
    has_bias = any(layer.shift.any() for layer in layers.values())
    is_conv = {hasattr(layer.module, "nf") for layer in layers.values()}
    if len(is_conv) > 1:
        raise ValueError("a LoRA of PEFT has Conv1D or linear layers alone; exact is --to merged")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        lora_bias=has_bias,
        fan_in_fan_out=is_conv == {True},
        task_type="CAUSAL_LM",
    )
    with _taking_biases():
        wrapped = peft.get_peft_model(base, config)
    for name, (up, down) in factors.items():
        part = base.get_submodule(name)
        _fill(part.lora_A["default"].weight, down)
        _fill(part.lora_B["default"].weight, up)
        if has_bias:
            _fill(part.lora_B["default"].bias, layers[name].shift)
    with _taking_biases():
        wrapped.save_pretrained(directory)
    notes = ["vLLM reads no bias of a LoRA: serve this one with PEFT, or export --to merged"]
    return {"edits": _described(plan), "rank": rank, "notes": notes if has_bias else []}


def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.data.zero_()
    parameter.data[tuple(map(slice, values.shape))] = values.to(parameter)


def read_lora(base: Any, directory: Path) -> Any:
    """The base with the adapter, by PEFT alone."""
    with _taking_biases():
        return import_peft().PeftModel.from_pretrained(base, str(directory)).eval()


@contextlib.contextmanager
def _taking_biases() -> Iterator[None]:
    """Within the block, PEFT does not warn of a LoRA's biases.

    It cannot merge one into a layer without bias, and takes its vector for a part of a matrix.
    """
    with warnings.catch_warnings():
        for message in (".*lora_bias=True", r".*lora_B\.bias"):
            warnings.filterwarnings("ignore", message=message)
        yield


def write_control_vector(reft_model: ReftModel, directory: Path) -> dict[str, Any]:
    """Write a control vector of llama.cpp; returns and raises as `write_merged`.

    `direction.N` is added to what the block N returns, at every token. llama.cpp has none for
    block 0.
    """
    expect_no_trained_base(reft_model, "a control vector")
    import gguf

    layers = list(find_layers(reft_model.model))
    vectors: dict[int, np.ndarray[Any, Any]] = {}
    for placed, edit in acting_edits(reft_model):
        vectors[_block_of(placed, edit, layers)] = edit.constant.float().numpy()
    if not vectors:
        raise ValueError("the adapter edits nothing, so there is no control vector")
    writer = gguf.GGUFWriter(directory / CONTROL_VECTOR, "controlvector")
    writer.add_string("controlvector.model_hint", reft_model.model.config.model_type)
    writer.add_uint32("controlvector.layer_count", len(layers))
    for number, vector in sorted(vectors.items()):
        writer.add_tensor(f"{_DIRECTION}{number}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"layers": sorted(vectors), "notes": [f"llama.cpp: --control-vector {CONTROL_VECTOR}"]}


def _block_of(placed: PlacedUnit, edit: LinearEdit, layers: Sequence[nn.Module]) -> int:
    """The number of the block whose output gets a constant, and nothing else."""
    site = placed.site
    if not edit.is_constant:
        raise refusal(placed, "a control vector is a constant, such as addition or bias")
    if site.is_input or site.columns is not None or site.module not in layers:
        raise refusal(placed, "a control vector is added at a block's output; exact is that place")
    if (number := list(layers).index(site.module)) == 0:
        raise refusal(placed, "llama.cpp has no control vector of block 0; exact is --to merged")
    return number


def adding_control_vector(base: Any, directory: Path) -> Any:
    """A context in which a base has the control vector, read back, at its blocks' outputs."""
    import gguf

    reader = gguf.GGUFReader(directory / CONTROL_VECTOR)
    layers = list(find_layers(base))

    def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden + vector.to(hidden)

    changes = []
    for tensor in reader.tensors:
        layer = layers[int(tensor.name.removeprefix(_DIRECTION))]
        changes.append((layer, False, adding(torch.from_numpy(np.array(tensor.data)))))
    return changing(changes)


def _described(plan: WeightPlan) -> dict[str, str]:
    """By unit, the layers that hold its edit."""
    return {routed.placed.key: str(routed.route) for routed in plan.routed}
