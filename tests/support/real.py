"""Where real data and models lie, for tests that are skipped without them."""

import os
from pathlib import Path

REAL = Path(os.environ.get("REFTNOISE_REAL", "nowhere"))
"""A folder with `data` and `models`."""
