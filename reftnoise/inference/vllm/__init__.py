"""Adapters in vLLM, served as vLLM serves LoRA."""

SCALE = "reft_scale"
"""The extra argument of a request of vLLM that multiplies its edits."""
