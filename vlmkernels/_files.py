# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: what every part of the package writes through."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, forces it to disk, and moves it into place.

    A reader, a kill or a full disk sees the old file or the new one, never a part. The new file has the permissions
    that the process gives to new files, whatever ``write`` did.

    Args:
        path: the file to replace.
        write: called with the path of the temporary file, which exists and is empty.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        # Without this a crash of the machine may undo the rename, though never tear the file.
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a text file (UTF-8) atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
