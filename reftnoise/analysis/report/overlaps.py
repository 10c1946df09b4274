"""A picture of how alike adapters are."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ..._util.files import replace_all
from .figures import draw_overlaps, picture


def write_overlaps(
    output: str | Path, names: Sequence[str], overlaps: Float[Tensor, "n n"]
) -> None:
    """Write a matrix of overlaps as a PNG file.

    Raises:
        ValueError: another kind of file.
    """
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {str(output)!r}: expected a PNG file, such as overlaps.png")
    about = f"How alike the subspaces are that {', '.join(names)} edit"
    drawn = picture(path.stem, about, lambda: draw_overlaps(names, overlaps.numpy()))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all(path.parent, {path.name: drawn.light})
