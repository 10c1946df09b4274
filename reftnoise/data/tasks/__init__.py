"""Tasks: the prompt of a row, the answer in a text, and the metric."""
