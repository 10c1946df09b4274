"""What an adapter does, measured and shown."""
