"""What else acts while a base runs: passes, threads, compiled code, checkpoints, shards, hooks.

Threads take the lock of a base in turn. Within a thread the innermost pass alone edits: a hook or a
logits processor may run a pass of another `ReftModel`, or of the bare base.

torch.compile looks at a module's hooks when it traces it, and never again: what it compiled without
ours would run unedited, and what it compiled with them would edit the bare base. So within a pass,
a compiled module with one of our hooks inside runs as it was written, and a compiled module whose
own input or output is edited stays compiled, with the edit outside.
"""

import contextlib
import copy
import functools
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .threads import ForkSafeLock, undone_in_children

_LOCKS: "WeakKeyDictionary[nn.Module, ForkSafeLock]" = WeakKeyDictionary()
_PASSES: "WeakKeyDictionary[nn.Module, list[object]]" = WeakKeyDictionary()

_CHECKPOINT_FUNCTIONS = ("checkpoint_fn", "_gradient_checkpointing_func")
"""What recomputes: of torch's CheckpointWrapper, which FSDP puts around layers; of transformers."""


# -- passes and threads --------------------------------------------------------------------------


def exclusive(base: nn.Module) -> ForkSafeLock:
    """The lock of `base`, which a thread holds while it runs a pass."""
    return _LOCKS.setdefault(base, ForkSafeLock())


@contextlib.contextmanager
def innermost(base: nn.Module) -> Iterator[Callable[[], bool]]:
    """Make the block the innermost pass on `base`; yields whether it still is, in this thread."""
    passes, mine, thread = _PASSES.setdefault(base, []), object(), get_ident()
    passes.append(mine)
    try:
        yield lambda: passes[-1:] == [mine] and get_ident() == thread
    finally:
        passes.remove(mine)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, which can read no value, or forward mode."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


# -- compiled code -------------------------------------------------------------------------------


@contextlib.contextmanager
def as_written(base: nn.Module, hooked: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, no compiled code of `base` has one of the modules `hooked` inside.

    Of `hooked` themselves, those that `edited_outside` can serve stay compiled.
    """
    modules = set(hooked)
    with contextlib.ExitStack() as stack:
        for module in modules_of(base):
            original = _written_forward(module)
            if original is None and module._compiled_call_impl is None:
                continue
            has_hooks_inside = not modules.isdisjoint(
                m for m in module.modules() if m is not module
            )
            if original is not None and has_hooks_inside:
                stack.enter_context(replaced(module, "forward", original))
            if module._compiled_call_impl is not None and (
                has_hooks_inside or (module in modules and not can_edit_outside(module))
            ):
                stack.enter_context(replaced(module, "_compiled_call_impl", None))
        yield


@contextlib.contextmanager
def calls_as_written(base: nn.Module) -> Iterator[None]:
    """Within the block, calls of `base` that `generate` compiles run as they were written."""
    get_compiled_call: Any = getattr(base, "get_compiled_call", None)
    is_inside = True

    def get_call(*config: Any) -> Callable[..., Any]:
        compiled = get_compiled_call(*config)

        def call(*args: Any, **kwargs: Any) -> Any:
            return (base if is_inside else compiled)(*args, **kwargs)

        return call

    with replaced(base, "get_compiled_call", get_call):
        try:
            yield
        finally:
            is_inside = False


def can_edit_outside(module: nn.Module) -> bool:
    """Whether a module was compiled in place, and no foreign hooks see its hidden states."""
    is_compiled = module._compiled_call_impl is not None
    return is_compiled and not (module._forward_hooks or module._forward_pre_hooks)


def edited_outside(
    module: nn.Module, edit: Callable[..., Any], *, is_input: bool
) -> contextlib.AbstractContextManager[None]:
    """Within the block, call a hook of `module` before or after its compiled code."""
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_input:
            args, kwargs = edit(module, args, kwargs)
            return compiled(*args, **kwargs)
        return edit(module, args, kwargs, compiled(*args, **kwargs))

    return replaced(module, "_compiled_call_impl", call)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of; the module itself if it is none."""
    inside = module._modules.get("_orig_mod")
    return module if inside is None else inside


def _written_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What `module.forward` was before it was compiled; None if it is not."""
    forward = module.forward
    original = getattr(forward, "_torchdynamo_orig_callable", None)
    if original is None or getattr(forward, "_torchdynamo_disable", False):
        return None
    return MethodType(original, module) if isinstance(forward, MethodType) else original


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within the block, a module itself, and not its class, has another attribute."""
    own = module.__dict__
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


# -- gradient checkpointing: the backward pass recomputes what ran in the forward pass ------------


def checkpointed_modules(base: nn.Module) -> list[nn.Module]:
    """The modules whose layers gradient checkpointing would recompute now."""
    return [
        module
        for module in modules_of(base)
        if module.training
        and torch.is_grad_enabled()
        and any(name in vars(module) for name in _CHECKPOINT_FUNCTIONS)
        and vars(module).get("gradient_checkpointing", "checkpoint_fn" in vars(module))
    ]


@contextlib.contextmanager
def checkpointing(
    module: nn.Module, repeatable: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block, checkpoint what `repeatable` makes of the functions of `module`.

    It is called as a layer is about to run, and returns its function such that the backward pass,
    which comes when the block has ended, recomputes what runs now.
    """
    name = next(name for name in _CHECKPOINT_FUNCTIONS if name in vars(module))
    checkpoint = getattr(module, name)

    def checkpoint_repeatable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(repeatable(function), *args, **kwargs)

    with replaced(module, name, checkpoint_repeatable):
        yield


# -- hooks ---------------------------------------------------------------------------------------


def hook_first(module: nn.Module, edit: Callable[..., Any], *, is_input: bool) -> RemovableHandle:
    """Register a hook; first, so that later hooks read edited hidden states."""
    if is_input:
        return module.register_forward_pre_hook(edit, prepend=True, with_kwargs=True)
    return module.register_forward_hook(edit, prepend=True, with_kwargs=True)


def put_in_order(module: nn.Module) -> None:
    """Store hooks in the order in which they run; torch 2.8 confuses those that were prepended."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        ordered = list(hooks.items())
        hooks.clear()
        hooks.update(ordered)


def has_foreign_hooks(module: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Whether foreign hooks are on a module; ours, and those of the packages `but`, are not."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    owners = [str(getattr(getattr(hook, "func", hook), "__module__", "")) for hook in hooks]
    return not all(owner.startswith(("reftnoise.", *but)) for owner in owners)


def is_watched(module: nn.Module) -> bool:
    """Whether other libraries count a module's calls: by hooks, or by sharding it.

    Shards are gathered at each call, so all processes must make equally many.
    """
    if type(module).__module__.startswith("torch.distributed."):
        return True
    return has_foreign_hooks(module, but=("transformers.utils.output_capturing",))


def is_awaited(module: nn.Module) -> bool:
    """Whether others wait for the end of a module's call: by hooks, accelerate's among them."""
    return has_foreign_hooks(module) or hasattr(module, "_hf_hook")


@contextlib.contextmanager
def alone(base: nn.Module) -> Iterator[None]:
    """Within the block, the base is uncompiled, and no foreign hook runs."""
    with undone_in_children() as stack:
        for module in modules_of(base):
            if is_watched(module):
                for name in ("_forward_hooks", "_forward_pre_hooks"):
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, OrderedDict())
        stack.enter_context(as_written(base, modules_of(base)))
        yield


# -- modules and weights as they are now ---------------------------------------------------------


def modules_of(module: nn.Module) -> list[nn.Module]:
    """`module.modules()`, in a tenth of its time, which would be some percent of a short pass."""
    seen: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [module]
    while left:
        if (child := left.pop()) is not None and child not in seen:
            seen[child] = None
            left.extend([*child._modules.values()][::-1])
    return list(seen)


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """`module.parameters()`, in a tenth of its time; shared ones as often as they occur."""
    owners = modules_of(module)
    return [p for owner in owners for p in owner._parameters.values() if p is not None]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module that has a path now; an AttributeError if there is none."""
    module: Any = model
    for part in path_parts(path):  # much faster than get_submodule, at every pass
        module = module._modules[part] if part in module._modules else getattr(module, part)
    return module


@functools.cache
def path_parts(path: str) -> list[str]:
    """`layers[3].mlp` → `["layers", "3", "mlp"]`."""
    return re.sub(r"\[(\d+)\]", r".\1", path).split(".")


def with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of a module with other children in the places of some."""
    copied = copy.copy(module)
    copied._modules = module._modules | dict(children)
    return copied


def weights_stamp(module: nn.Module) -> tuple[object, ...]:
    """A value that changes with the module's weights, but for changes that torch does not record.

    These are changes through `.data`, and those by fused optimizers. Buffers are among the weights:
    rotary frequencies decide about keys.
    """
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for owner in modules_of(module)
        for tensor in (*owner._parameters.values(), *owner._buffers.values())
        if tensor is not None
    )


# -- hidden states -------------------------------------------------------------------------------


def mask_after_convolutions(base: nn.Module) -> Callable[[int, Tensor], Tensor] | None:
    """How many hidden states, and the mask of its samples, give the mask of hidden states.

    Models of sound begin with convolutions, and have such a function; None for others.
    """
    shorten: Any = getattr(base, "_get_feature_vector_attention_mask", None)
    if shorten is not None and "add_adapter" in inspect.signature(shorten).parameters:
        shorten = functools.partial(shorten, add_adapter=False)  # it comes after the layers
    return shorten


def tokens_that_are_seen(
    mask: Shaped[Tensor, "batch heads length width"], past: int
) -> Bool[Tensor, "batch width"]:
    """The tokens that a mask of pairs does not hide: they see themselves, or are cached and seen.

    Args:
        mask: whether a token sees another, or what is added to its score, by which its weight is
            multiplied by exp(mask): 0 in fp32 from −104 down.
        past: number of cached tokens.
    """
    if mask.is_floating_point():
        mask = mask.float().exp() > 0
    sees = mask.bool().any(1)
    own = sees[:, :, past:].diagonal(dim1=1, dim2=2)
    return torch.cat([sees[:, :, :past].any(1), own], dim=1)


def shaped_like(hidden: Tensor, flat: Tensor) -> Tensor:
    """Fresh `flat` in the shape of `hidden`, not as a view.

    FSDP2 gathers for the backward pass by a hook on a layer's output, which an in-place operation
    on a view would drop.
    """
    return torch.ops.aten._unsafe_view(flat, hidden.shape)


# -- shards ----------------------------------------------------------------------------------------
# FSDP2 and ZeRO-3 gather a module's parameters while its forward runs.


def is_part(tensor: Tensor) -> bool:
    """Whether other processes hold parts of a parameter."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def is_spread(module: nn.Module) -> bool:
    """Whether processes hold parts of a module's parameters at least while it does not run."""
    if any(isinstance(child, FSDPModule) for child in modules_of(module)):
        return True
    return any(is_part(parameter) for parameter in parameters_of(module))


def is_in_ddp() -> bool:
    """Whether all processes run copies of a model at this time, each on rows of its own."""
    copy: Any = DistributedDataParallel._active_ddp_module
    return copy is not None and copy.process_group is torch.distributed.group.WORLD


def gather_for(module: nn.Module, method: str) -> None:
    """Have FSDP2 gather a module that it shards by itself for `method`, as for `forward`.

    Raises:
        ValueError: modules within `module` are sharded by themselves.
    """
    for name, child in module.named_children():
        if isinstance(child, FSDPModule):
            raise ValueError(
                f"{type(module).__name__}: FSDP2 shards its {name!r} by itself; call fully_shard "
                "on the intervention, or on the whole model alone"
            )
    if isinstance(module, FSDPModule) and method not in vars(module):
        register_fsdp_forward_method(module, method)
