"""Find the sites of a base model that units can edit, by structure and not by architecture.

An encoder-decoder model has two stacks of layers, each with a sequence of its own. A component is
the encoder's, which reads the prompt, unless it begins with `decoder.`.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..._util.errors import nearest
from ...config.components import COMPONENTS, Stack, is_dotted, split_component
from .peft import inner_model
from .running import path_parts, uncompiled

# Children of a layer, by their names in the models of transformers.
_CHILDREN = {
    "attention_output": re.compile(r"attn|attention"),
    "mlp_output": re.compile(r"mlp|feed_forward|ffn|moe"),
}
_NORM = re.compile(r"norm|ln_|dropout")


@dataclass(frozen=True)
class Site:
    """The input or the output of a module, where hidden states can be edited."""

    module: nn.Module
    name: str = field(compare=False)  # a component and a dotted path may name the same site
    is_input: bool
    width: int | None = field(compare=False)
    """The width of its hidden states; None where only a forward pass shows it."""
    stack: Stack | None = None
    """The stack of an encoder-decoder model; None in other models."""
    is_embeddings: bool = field(default=False, compare=False)
    """Whether the module makes hidden states of token ids."""

    def __str__(self) -> str:
        return f"{self.name}.{'input' if self.is_input else 'output'}"


def find_site(model: PreTrainedModel, component: str, layer: int | None = None) -> Site:
    """The site that a component name, or a dotted path, means in `model`.

    Raises:
        ValueError: there is no such component, layer or module; the message says what there is.
    """
    model = inner_model(model)
    if is_dotted(component):
        path, _, end = component.rpartition(".")
        module = _by_path(model, path, component)
        stack = _stack_around(model, module)
        width = _width(module, end == "input")
        return Site(module, path, end == "input", width, stack, _embeds(model, module, stack))
    stack, name = split_component(component)
    if name not in COMPONENTS:
        raise ValueError(
            f"component {component!r}: expected {', '.join(COMPONENTS)} or a dotted path that ends "
            "in .output or .input, such as 'model.layers[3].mlp.output'"
        )
    if stack is not None and not is_encoder_decoder(model):
        raise ValueError(
            f"component {component!r}: {type(model).__name__} is not an encoder-decoder "
            f"model; expected {name!r}"
        )
    stack = stack or stacks_of(model)[0]
    if name == "embeddings":
        embeddings = input_embeddings(model, stack)
        name = _name_of(model, embeddings)
        return Site(embeddings, name, False, _width(embeddings), stack, is_embeddings=True)
    layers = find_layers(model, stack)
    if layer is None or not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    module = layers[layer]
    if name in _CHILDREN:
        module = _child(module, name, _name_of(model, module))
    width = hidden_size(model)
    return Site(module, _name_of(model, module), name.endswith("_input"), width, stack)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model reads one sequence and writes another."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def stacks_of(model: PreTrainedModel) -> tuple[Stack | None, ...]:
    """The parts of a model with a sequence each; None for a model that has one sequence."""
    return ("encoder", "decoder") if is_encoder_decoder(model) else (None,)


def find_stack(model: PreTrainedModel, stack: Stack) -> nn.Module:
    """The encoder or the decoder of an encoder-decoder model."""
    part: nn.Module = model.get_encoder() if stack == "encoder" else model.get_decoder()
    return part


def find_layers(model: PreTrainedModel, stack: Stack | None = None) -> nn.ModuleList:
    """The stack of layers: the first list of as many modules as the config counts hidden layers.

    The decoder comes first, since a vision tower may have as many layers.
    """
    config = model.config.get_text_config()
    if stack is None:
        parts = [model.get_decoder() if hasattr(model, "get_decoder") else None, model]
        names = ["num_hidden_layers"]
    else:
        parts = [find_stack(model, stack)]
        names = [f"{stack}_layers", f"num_{stack}_layers", "num_hidden_layers"]
    count = next((getattr(config, n) for n in names if getattr(config, n, None)), None)
    for part in parts:
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ValueError(
        f"{type(model).__name__}: found no list of {count or 'its'} layers; name the component by "
        f"its dotted path, ending in .output or .input; lists of modules: {_lists(model)}"
    )


def num_layers(model: PreTrainedModel, stack: Stack | None = None) -> int:
    """The number of layers that `find_layers` finds."""
    return len(find_layers(model, stack or stacks_of(model)[0]))


def layer_of(model: PreTrainedModel, site: Site) -> int | None:
    """The number of the layer that has a site; None for a site outside of the layers."""
    layers = find_layers(model, site.stack)
    return next((n for n, layer in enumerate(layers) if site.module in layer.modules()), None)


def hidden_size(model: PreTrainedModel) -> int:
    """The width of the residual stream, d."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if width is None:
        raise ValueError(f"{type(model).__name__}: its config has no hidden_size")
    return int(width)


def input_embeddings(model: PreTrainedModel, stack: Stack | None = None) -> nn.Module:
    """The module that embeds token ids."""
    part: Any = model if stack is None else find_stack(model, stack)
    try:
        embeddings: nn.Module = part.get_input_embeddings()
    except NotImplementedError:
        raise ValueError(
            f"component 'embeddings': {type(part).__name__} has no get_input_embeddings; name it "
            "by its dotted path, such as 'model.embed_tokens.output'"
        ) from None
    return embeddings


def _embeds(model: PreTrainedModel, module: nn.Module, stack: Stack | None) -> bool:
    try:
        return module is input_embeddings(model, stack)
    except ValueError:
        return False


def trained_modules(model: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` means, by path; for None, a classifier's or tagger's head.

    A head is what a model without language head has outside of its `base_model`. PEFT trains its
    own copy of it.

    Raises:
        ValueError: a name that no module has, or ends with.
    """
    if names is None:
        has_none = model.base_model is model or model.get_output_embeddings() is not None
        if has_none or hasattr(model, "peft_config"):
            return {}
        return {n: part for n, part in model.named_children() if part is not model.base_model}
    modules = {n: m for n, m in model.named_modules() if n}
    chosen: dict[str, nn.Module] = {}
    for name in names:
        fitting = {n: m for n, m in modules.items() if n == name or n.endswith(f".{name}")}
        if not fitting:
            ends = {n.rpartition(".")[2] for n in modules}
            hint = nearest(name, ends, "its named_modules() are all that there are")
            raise ValueError(f"modules_to_save {name!r}: the model has no such module; {hint}")
        # PEFT's wrapper of a module trains a copy of it, and keeps the original.
        chosen |= {n: m for n, m in fitting.items() if not hasattr(m, "original_module")}
    return chosen


def _lists(model: nn.Module) -> str:
    modules = model.named_modules()
    lists = [(n, len(m)) for n, m in modules if isinstance(m, nn.ModuleList) and len(m)]
    return ", ".join(f"{name}[0-{length - 1}]" for name, length in lists[:8]) or "none"


def _stack_around(model: PreTrainedModel, module: nn.Module) -> Stack | None:
    if not is_encoder_decoder(model):
        return None
    return "decoder" if module in find_stack(model, "decoder").modules() else "encoder"


def _child(layer: nn.Module, component: str, path: str) -> nn.Module:
    layer = uncompiled(layer)
    names = [name for name, _ in layer.named_children()]
    fitting = [n for n in names if _CHILDREN[component].search(n) and not _NORM.search(n)]
    if len(fitting) != 1:
        raise ValueError(
            f"component {component!r}: {type(layer).__name__} has {', '.join(names)}; name one of "
            f"them by its dotted path, such as '{path}.{names[0]}.output'"
        )
    return layer.get_submodule(fitting[0])


def _by_path(model: nn.Module, path: str, component: str) -> nn.Module:
    module = model
    for part in path_parts(path):
        children = dict(uncompiled(module).named_children())
        if part not in children:
            raise ValueError(
                f"component {component!r}: {type(module).__name__} has no {part!r}, but "
                f"{', '.join(children) or 'no modules in it'}"
            )
        module = children[part]
    return module


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _width(module: nn.Module, is_input: bool = False) -> int | None:
    """The last dimension of a module's input or output, if its attributes show it."""
    if isinstance(module, nn.Linear):
        return module.in_features if is_input else module.out_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def takes_position_ids(model: nn.Module) -> bool:
    """Whether a model's forward takes the position of each column in its row."""
    return "position_ids" in inspect.signature(model.forward).parameters
