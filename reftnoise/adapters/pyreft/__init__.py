"""Adapters of pyreft and pyvene, read and written."""
