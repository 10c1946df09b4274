"""Bridges to libraries of others; each module needs the library that it is named after."""
