"""A running server of the OpenAI API, compared with transformers here."""
