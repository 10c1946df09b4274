"""Adapters in vLLM, served as vLLM serves LoRA."""

from pathlib import Path

SCALE = "reft_scale"
"""The extra argument of a request of vLLM that multiplies its edits."""

CAPTURE = "reft_capture"
"""The extra argument that names the file for hidden states, and the server's option of a folder."""

CAPTURE_POSITIONS = "reft_capture_positions"
"""The extra argument that says which tokens' states are captured."""


def captured_file(folder: Path, name: str) -> Path:
    """The file that has the states of a request."""
    return folder / f"{name}.safetensors"
