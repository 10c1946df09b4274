"""pyreft's `config` module."""

from ..config.representations import ReftConfig

__all__ = ["ReftConfig"]
