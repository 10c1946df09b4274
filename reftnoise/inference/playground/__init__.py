"""A page in the browser: base and adapters side by side, and what their edits do."""
