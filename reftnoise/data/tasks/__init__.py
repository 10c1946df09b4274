"""Tasks: one file each, with prompt, answer extraction and metric."""
