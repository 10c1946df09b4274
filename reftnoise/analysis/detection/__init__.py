"""Concepts in texts: which tokens activate a unit's direction, and how well they separate texts."""
