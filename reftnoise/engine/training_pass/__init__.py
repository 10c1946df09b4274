"""One training pass: its cheapest way, and the loss that is the base's own."""
