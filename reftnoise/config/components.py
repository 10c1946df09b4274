"""The names of the components that units can edit."""

from typing import Literal

COMPONENTS = (
    *("block_output", "block_input", "attention_output", "mlp_output", "embeddings"),
    *("attention_input", "query_output", "key_output", "value_output", "attention_value_output"),
    *("mlp_input", "mlp_activation", "attention_parallel", "mlp_parallel"),
)
"""Names of pyvene, but for the embeddings and the last two. `attention_value_output` is the sum of
values that the output projection reads, and `mlp_activation` what the activation function returns.
At the last two, an edit is computed of the module's input and added to its output."""

Stack = Literal["encoder", "decoder"]


def is_dotted(component: str) -> bool:
    """Whether a component is a path such as `model.layers[3].output`."""
    return component.endswith((".output", ".input"))


def split_component(component: str) -> tuple[Stack | None, str]:
    """`"decoder.block_output"` → stack and name; the stack is None where none is named."""
    stack, _, name = component.partition(".")
    if name in COMPONENTS and stack in ("encoder", "decoder"):
        return stack, name  # type: ignore[return-value]  # one of its two literals
    return None, component
