"""What a config says, as plain values: entries, positions, components, a peft section."""
