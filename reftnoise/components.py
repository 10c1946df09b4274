"""Find the places of a base model that units can edit, by structure and not by architecture."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .compiled import uncompiled

COMPONENTS = ("block_output", "block_input", "attention_output", "mlp_output", "embeddings")

# Children of a decoder layer, by what the models of transformers call them.
_CHILDREN = {
    "attention_output": re.compile(r"attn|attention"),
    "mlp_output": re.compile(r"mlp|feed_forward|ffn|moe"),
}
_NORM = re.compile(r"norm|ln_|dropout")


@dataclass(frozen=True)
class Site:
    """One place of a model: the input or output of one of its modules."""

    module: nn.Module
    name: str = field(compare=False)  # a component and a dotted path may name one site
    is_input: bool
    width: int | None = field(compare=False)
    """Of its hidden states; None where only a forward pass can tell."""

    def __str__(self) -> str:
        return f"{self.name}.{'input' if self.is_input else 'output'}"


def is_dotted(component: str) -> bool:
    """Whether a component is a path such as `model.layers[3].output`."""
    return component.endswith((".output", ".input"))


def find_site(model: PreTrainedModel, component: str, layer: int | None = None) -> Site:
    """The site that a component name, or a dotted path, means in `model`.

    Raises:
        ValueError: there is no such component, layer or module; the message says what there is.
    """
    if component == "embeddings":
        embeddings = input_embeddings(model)
        return Site(embeddings, _name_of(model, embeddings), False, _width(embeddings))
    if is_dotted(component):
        path, _, end = component.rpartition(".")
        module = _by_path(model, path, component)
        return Site(module, path, end == "input", _width(module, end == "input"))
    if component not in COMPONENTS:
        raise ValueError(
            f"component {component!r}: expected {', '.join(COMPONENTS)} or a dotted path that ends "
            "in .output or .input, such as 'model.layers[3].mlp.output'"
        )
    layers = find_layers(model)
    if layer is None or not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    module = layers[layer]
    if component in _CHILDREN:
        module = _child(module, component)
    return Site(module, _name_of(model, module), component == "block_input", hidden_size(model))


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of layers: the first list of as many modules as the config counts hidden layers.

    It is looked for in the decoder first, since a vision tower may have as many layers.
    """
    count = _text_config(model).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for part in (decoder, model):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ValueError(
        f"{type(model).__name__}: found no list of {count} layers; name the component by its "
        "dotted path, such as 'model.layers[3].output'"
    )


def num_layers(model: PreTrainedModel) -> int:
    """How many layers `find_layers` finds."""
    return len(find_layers(model))


def hidden_size(model: PreTrainedModel) -> int:
    """The width of the residual stream, d."""
    return int(_text_config(model).hidden_size)


def input_embeddings(model: PreTrainedModel) -> nn.Module:
    """The module that embeds token ids."""
    embeddings: nn.Module = model.get_input_embeddings()
    return embeddings


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _child(layer: nn.Module, component: str) -> nn.Module:
    layer = uncompiled(layer)
    names = [name for name, _ in layer.named_children()]
    fitting = [n for n in names if _CHILDREN[component].search(n) and not _NORM.search(n)]
    if len(fitting) != 1:
        raise ValueError(
            f"component {component!r}: {type(layer).__name__} has {', '.join(names)}; name one of "
            "them by its dotted path, such as 'model.layers[3].mlp.output'"
        )
    return layer.get_submodule(fitting[0])


def _by_path(model: nn.Module, path: str, component: str) -> nn.Module:
    module = model
    for part in re.sub(r"\[(\d+)\]", r".\1", path).split("."):
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
    """The last dimension of a module's input or output, if its attributes tell."""
    if isinstance(module, nn.Linear):
        return module.in_features if is_input else module.out_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def takes_position_ids(model: nn.Module) -> bool:
    """Whether a model's forward can be told which token of its row each column holds."""
    return "position_ids" in inspect.signature(model.forward).parameters
