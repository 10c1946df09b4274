"""Adapted models in use: prompts, chat, servers, a page, vLLM."""
