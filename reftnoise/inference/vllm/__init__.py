"""Adapters in vLLM, served as vLLM serves LoRA."""

SCALE = "reft_scale"
"""In vLLM, the extra argument of a request by which its edits are multiplied."""
