"""Find the sites of a base model that units can edit, by structure and not by architecture.

An encoder-decoder model has two stacks of layers, each with a sequence of its own. A component is
the encoder's, which reads the prompt, unless it begins with `decoder.`.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..._util.errors import nearest
from ...config.components import COMPONENTS, Stack, is_dotted, split_component
from ...interventions import Columns
from .heads import OUTPUT_PROJECTION, feature_count, find_heads, runs_of_heads
from .peft import inner_model
from .running import path_parts, uncompiled

# Children of a layer, by their names in the models of transformers; and modules in such a child, by
# whole names.
_ATTENTION, _MLP = re.compile(r"attn|attention"), re.compile(r"mlp|feed_forward|ffn|moe")
_NORM = re.compile(r"norm|ln_|dropout")
_PARTS: dict[str, tuple[re.Pattern[str], re.Pattern[str] | None]] = {
    "attention_output": (_ATTENTION, None),
    "attention_input": (_ATTENTION, None),
    "query_output": (_ATTENTION, re.compile(r"(q|query)(_proj|_lin)?")),
    "key_output": (_ATTENTION, re.compile(r"(k|key)(_proj|_lin)?")),
    "value_output": (_ATTENTION, re.compile(r"(v|value)(_proj|_lin)?")),
    "attention_value_output": (_ATTENTION, OUTPUT_PROJECTION),
    "mlp_output": (_MLP, None),
    "mlp_input": (_MLP, None),
    "mlp_activation": (_MLP, re.compile(r"act|act_fn|activation|activation_fn")),
}
_PARALLEL = "_parallel"
"""The end of components whose edits of an output are computed of the input."""
_THIRDS = {"query_output": 0, "key_output": 1, "value_output": 2}
"""Where each is in what GPT-2's `c_attn` returns, a `Conv1D` with `nf` features."""


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
    columns: Columns | None = None
    """The features that are edited, as first and end of each run; None for all."""
    head_width: int | None = field(default=None, compare=False)
    """The width of a head, where the features are those of heads."""
    is_parallel: bool = False
    """Whether edits of the output are computed of the input."""

    def __str__(self) -> str:
        if self.is_parallel:
            return f"{self.name}.output, computed of its input"
        runs = ",".join(f"{start}:{end}" for start, end in self.columns or ())
        return f"{self.name}.{'input' if self.is_input else 'output'}{f'[{runs}]' if runs else ''}"

    @property
    def whole(self) -> "Site":
        """The site with all features of its module's input or output."""
        if self.columns is None:
            return self
        width = feature_count(self.module, is_input=self.is_input)
        return replace(self, columns=None, width=width, head_width=None)

    def overlaps(self, other: "Site") -> bool:
        """Whether another site has features of this one."""
        if self.whole != other.whole:
            return False
        if self.columns is None or other.columns is None:
            return True
        return any(a < d and c < b for a, b in self.columns for c, d in other.columns)


def find_site(
    model: PreTrainedModel,
    component: str,
    layer: int | None = None,
    heads: Sequence[int] | str | None = None,
) -> Site:
    """The site that a component name, or a dotted path, means in `model`.

    Args:
        model: a base model.
        component: name or path.
        layer: number of the layer, for a name of a place within layers.
        heads: of `head_output`, the heads; all for None or `"all"`.

    Raises:
        ValueError: there is no such component, layer, module or head; the message says what there
            is.
    """
    model = inner_model(model)
    if is_dotted(component):
        path, _, end = component.rpartition(".")
        path = _inside_peft(model, path)
        module = _by_path(model, path, component)
        stack = _stack_around(model, module)
        width = feature_count(module, is_input=end == "input")
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
        return Site(embeddings, name, False, feature_count(embeddings), stack, is_embeddings=True)
    layers = find_layers(model, stack)
    if layer is None or not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer}: {type(model).__name__} has layers 0 to {len(layers) - 1}")
    module, is_input = layers[layer], name.endswith("_input")
    if name == "head_output":
        return _site_of_heads(model, module, heads, stack)
    if name not in _PARTS and not name.endswith(_PARALLEL):
        return Site(module, _name_of(model, module), is_input, hidden_size(model), stack)
    return _part_of_layer(model, module, name, stack)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model reads one sequence and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def can_generate(model: PreTrainedModel) -> bool:
    """Whether a model writes tokens; a module that is none of transformers does not."""
    inner = inner_model(model)
    return hasattr(inner, "can_generate") and bool(inner.can_generate())


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
    except (ValueError, AttributeError):  # no model of transformers
        return False


def trained_modules(model: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` means, by path; for None, a classifier's or tagger's head.

    A head is what a model without language head has outside of its `base_model`. PEFT trains its
    own copy of it.

    Raises:
        ValueError: a name that no module has, or ends with.
    """
    if names is None:
        if hasattr(model, "peft_config") or model.base_model is model:
            return {}
        if model.get_output_embeddings() is not None:
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


def _part_of_layer(
    model: PreTrainedModel, layer: nn.Module, component: str, stack: Stack | None
) -> Site:
    """The site of a component in a layer's attention or MLP."""
    if component.endswith(_PARALLEL):
        output = f"{component.removesuffix(_PARALLEL)}_output"
        site = _part_of_layer(model, layer, output, stack)
        features = feature_count(site.module, is_input=True)
        if features not in (None, site.width):
            raise ValueError(
                f"component {component!r}: {site.name} reads {features} features and writes "
                f"{site.width}: an edit of one from the other needs as many"
            )
        return replace(site, is_parallel=True)
    of_child, of_part = _PARTS[component]
    path, children = _name_of(model, layer), dict(uncompiled(layer).named_children())
    fitting = [n for n in children if of_child.search(n) and not _NORM.search(n)]
    child = _only(fitting, children, component, uncompiled(layer), path)
    is_input = component.endswith("_input") or component == "attention_value_output"
    if of_part is None:
        return Site(child, _name_of(model, child), is_input, hidden_size(model), stack)
    path, child = _name_of(model, child), uncompiled(child)
    is_activation = component == "mlp_activation"
    # Experts, which are deeper, run on tokens of their own.
    named = child.named_children() if is_activation else child.named_modules()
    parts = {name: part for name, part in named if name}
    fitting = [n for n in parts if of_part.fullmatch(n.rpartition(".")[2])]
    fused = parts.get("c_attn")
    if component in _THIRDS and hasattr(getattr(fused, "base_layer", fused), "nf"):
        third = hidden_size(model)
        start = third * _THIRDS[component]
        columns = ((start, start + third),)
        return Site(parts["c_attn"], f"{path}.c_attn", False, third, stack, columns=columns)
    part = _only(fitting, parts, component, child, path)
    width = feature_count(part, is_input=is_input)
    if is_activation:  # the last projection reads what it returns
        widths = [feature_count(part, is_input=True) for part in parts.values()]
        width = next((width for width in reversed(widths) if width is not None), None)
    return Site(part, _name_of(model, part), is_input, width, stack)


def _site_of_heads(
    model: PreTrainedModel,
    layer: nn.Module,
    heads: Sequence[int] | str | None,
    stack: Stack | None,
) -> Site:
    path = _name_of(model, layer)
    try:
        place = find_heads(layer, model.config.get_text_config())
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from None
    columns, width, features = None, place.head_width, place.heads * place.head_width
    if heads is not None and not isinstance(heads, str):
        if beyond := [head for head in heads if head >= place.heads]:
            raise ValueError(f"heads {beyond}: {path} has heads 0 to {place.heads - 1}")
        columns, features = runs_of_heads(heads, width), len(heads) * width
    path = f"{path}.{place.path}"
    return Site(place.projection, path, True, features, stack, columns=columns, head_width=width)


def _only(
    fitting: Sequence[str],
    parts: Mapping[str, nn.Module],
    component: str,
    owner: nn.Module,
    path: str,
) -> nn.Module:
    """The one module that fits a component; a ValueError names all that there are."""
    if len(fitting) != 1:
        names = ", ".join(parts) or "no modules"
        first = next(iter(parts), "module")
        raise ValueError(
            f"component {component!r}: {type(owner).__name__} has {names}; name one of them by its "
            f"dotted path, such as '{path}.{first}.output'"
        )
    return parts[fitting[0]]


def _inside_peft(model: nn.Module, path: str) -> str:
    """A path that begins at PEFT's wrapper, which `model` is in or will be, as one in `model`."""
    parts, children = path_parts(path), dict(uncompiled(model).named_children())
    if parts[0] != "base_model" or "base_model" in children:
        return path
    # LoRA and its kind are in a second wrapper, those with virtual tokens are not.
    for outside in (2, 1):
        if parts[outside : outside + 1] and parts[outside] in children:
            return ".".join(parts[outside:])
    return path


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


def takes_position_ids(model: nn.Module) -> bool:
    """Whether a model's forward takes the position of each column in its row."""
    return "position_ids" in inspect.signature(model.forward).parameters
