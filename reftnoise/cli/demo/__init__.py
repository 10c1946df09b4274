"""The demos: `tiny`, of the embedded model, and `chat`, of a chat model such as SmolLM2."""
