"""The whole of parameters that are spread over processes, and devices of those that are offloaded.

Parameters of FSDP2 (`fully_shard`) are DTensors, and those of DeepSpeed's ZeRO-3 are empty, with
attributes whose names begin with `ds_`. accelerate, which offloads, leaves parameters on the meta
device, and loads them by hooks on the modules.
"""

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def device_of(module: nn.Module) -> torch.device | None:
    """The device that a module computes on; None where neither weights nor hooks show it."""
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_meta:
        return None if parameter is None else parameter.device
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    return None


def size(parameter: Tensor) -> int:
    """The number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_state(module: nn.Module, is_kept: bool = True) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors. All processes must call it: each gives its parts.

    Args:
        module: module whose parameters may be in parts.
        is_kept: whether this process needs the result, which is empty otherwise.
    """
    state = module.state_dict()  # before parameters are looked at: it has FSDP2 shard them again
    parameters = dict(module.named_parameters(remove_duplicate=False))
    whole_tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        whole = _whole(parameters.get(name, tensor))
        if is_kept:
            whole_tensors[name] = whole
    return whole_tensors


def part_like(own: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole` that this process holds where it holds `own`."""
    if not isinstance(own, DTensor):
        return whole
    mesh = own.device_mesh
    everywhere = [Replicate()] * mesh.ndim  # all processes have read the file
    known = DTensor.from_local(whole.to(mesh.device_type), mesh, everywhere, run_check=False)
    return known.redistribute(mesh, own.placements)


def own_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def takes_weights_of_one_process(module: nn.Module) -> bool:
    """Whether accelerate is about to shard `module` by its `cpu_ram_efficient_loading`.

    It reads the state of one process, empties the module, shards it, and fills it with that state,
    which must then hold the frozen base, too.
    """
    parameter = next(module.parameters(), None)
    if isinstance(parameter, DTensor):
        return parameter.is_meta
    asked = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    is_asked = all(os.environ.get(name, "").lower() in ("1", "true") for name in asked)
    return is_asked and torch.distributed.is_available() and torch.distributed.is_initialized()


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        on_mesh: Any = tensor.to(tensor.device_mesh.device_type)  # from where FSDP2 offloads it to
        whole: Tensor = on_mesh.full_tensor()
        return whole.detach().cpu()
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    deepspeed: Any = import_module("deepspeed")
    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().to("cpu", copy=True)
