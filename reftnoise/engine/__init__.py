"""Edits inside the passes of a base."""
