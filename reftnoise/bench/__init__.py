"""Time and memory of training steps and generation, beside what others do on the same work."""
