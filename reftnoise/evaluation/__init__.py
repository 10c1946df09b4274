"""What a model writes, how likely it finds a text, and the scores of both."""
