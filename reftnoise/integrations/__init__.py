"""Bridges to libraries of others; each module needs the library that it is named after."""

SCALE = "reft_scale"
"""In vLLM, the extra argument of a request by which its edits are multiplied."""
