"""Adapters as what other programs read: plain weights, a LoRA, a control vector of llama.cpp."""
