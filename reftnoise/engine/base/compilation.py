"""Keep compiled parts of a base apart from hooks.

torch.compile looks at a module's hooks when it traces it, and never again: what it compiled without
ours would run unedited, and what it compiled with them would edit the bare base. So within a pass,
a compiled module with one of our hooks inside runs as it was written, and a compiled module whose
own input or output is edited stays compiled, with the edit outside.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn


@contextlib.contextmanager
def as_written(base: nn.Module, hooked: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, no compiled code of `base` has one of the modules `hooked` inside.

    Of `hooked` themselves, those that `edit_outside` can serve stay compiled.
    """
    modules = set(hooked)
    with contextlib.ExitStack() as stack:
        for module in base.modules():
            original = _written_forward(module)
            if original is None and module._compiled_call_impl is None:
                continue
            has_hooks_inside = not modules.isdisjoint(
                m for m in module.modules() if m is not module
            )
            if original is not None and has_hooks_inside:
                stack.callback(_replace(module, "forward", original))
            if module._compiled_call_impl is not None and (
                has_hooks_inside or (module in modules and not can_edit_outside(module))
            ):
                stack.callback(_replace(module, "_compiled_call_impl", None))
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

    undo = _replace(base, "get_compiled_call", get_call)
    try:
        yield
    finally:
        is_inside = False
        undo()


def can_edit_outside(module: nn.Module) -> bool:
    """Whether a module was compiled in place, and hooks of nobody see its hidden states."""
    is_compiled = module._compiled_call_impl is not None
    return is_compiled and not (module._forward_hooks or module._forward_pre_hooks)


def edit_outside(
    module: nn.Module, edit: Callable[..., Any], *, is_input: bool
) -> Callable[[], None]:
    """Call a hook of `module` before or after its compiled code; returns what undoes it."""
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_input:
            args, kwargs = edit(module, args, kwargs)
            return compiled(*args, **kwargs)
        return edit(module, args, compiled(*args, **kwargs))

    return _replace(module, "_compiled_call_impl", call)


def hook_first(
    module: nn.Module, edit: Callable[..., Any], *, is_input: bool
) -> Callable[[], None]:
    """Register a hook; first, so that whoever reads hidden states by one reads edited ones."""
    if is_input:
        handle = module.register_forward_pre_hook(edit, prepend=True, with_kwargs=True)
    else:
        handle = module.register_forward_hook(edit, prepend=True)
    return handle.remove


def uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile(module)` was made of; the module itself if it is none."""
    inside = module._modules.get("_orig_mod")
    return module if inside is None else inside


def put_in_order(module: nn.Module) -> None:
    """Store hooks in the order in which they run; torch 2.8 confuses those that were prepended."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        ordered = list(hooks.items())
        hooks.clear()
        hooks.update(ordered)


def _written_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What `module.forward` was before it was compiled; None if it is not."""
    forward = module.forward
    original = getattr(forward, "_torchdynamo_orig_callable", None)
    if original is None or getattr(forward, "_torchdynamo_disable", False):
        return None
    return MethodType(original, module) if isinstance(forward, MethodType) else original


def _replace(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of a module itself, not of its class; returns what sets it back."""
    own = module.__dict__
    had, before = name in own, own.get(name)
    own[name] = value

    def undo() -> None:
        if had:
            own[name] = before
        else:
            del own[name]

    return undo
