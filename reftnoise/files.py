"""Files are replaced, never written over: an interrupted write leaves what was there before."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def replace_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files under temporary names; when all are whole, rename them one by one."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        for name in files:
            os.replace(Path(scratch) / name, directory / name)
