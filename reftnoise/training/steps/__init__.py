"""What a Trainer sees to in its steps: the order of the data, and whether it diverges."""
