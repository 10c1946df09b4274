"""Steering vectors: fitted from pairs without training, and chosen by what they shift and cost."""
