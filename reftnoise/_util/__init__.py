"""Helpers without torch: errors, files, YAML, options, progress."""
