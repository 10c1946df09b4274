"""The names of the components that units can edit."""

from collections.abc import Sequence
from typing import Any, Literal

from .._util.errors import brief

COMPONENTS = (
    *("block_output", "block_input", "attention_output", "mlp_output", "embeddings"),
    *("attention_input", "query_output", "key_output", "value_output", "attention_value_output"),
    "head_output",
    *("mlp_input", "mlp_activation"),
    *("attention_parallel", "query_parallel", "key_parallel", "value_parallel", "mlp_parallel"),
)
"""Names of pyvene, but for the embeddings, `head_output` and the last five.
`attention_value_output` is the sum of values that the output projection reads, of which
`head_output` is some of the heads, and `mlp_activation` what the activation function returns. At
the last five, an edit is computed of the module's input and added to its output."""

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


def read_heads(heads: Any, component: str) -> list[int] | str | None:
    """The heads of an entry as its config has them: a sorted list, `"all"`, or None for no heads.

    Raises:
        ValueError: heads of a component without heads, or no list of different numbers from 0.
    """
    if split_component(component)[1] != "head_output":
        if heads is not None:
            raise ValueError(f"heads {brief(heads)}: {component!r} has none, 'head_output' has")
        return None
    if heads is None or heads == "all":
        return "all"
    numbers = [heads] if type(heads) is int else heads
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str) and numbers
    if not is_list or not all(type(head) is int and head >= 0 for head in numbers):
        raise ValueError(f"heads {brief(heads)}: expected a list of integers from 0, or 'all'")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"heads {brief(heads)}: every head may occur once")
    return sorted(numbers)
