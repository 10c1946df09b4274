"""Rows of files and hubs: read, put into templates, tokenised and collated."""
