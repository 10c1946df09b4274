"""Trained units as files, by name on a base, and in the form of other libraries."""
