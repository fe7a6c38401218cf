"""Files that a crash leaves as they were or as they shall be, never in between."""

from __future__ import annotations

import os
from pathlib import Path


def replace_durably(file: Path, content: bytes, mode: int) -> None:
    """Give ``file`` this content and, less the umask, this mode; on disk when this returns.

    It is written beside itself and renamed, so that a crash leaves the old file or the new one.
    """
    draft = file.with_name(file.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "wb", buffering=0) as opened:
        write_durably(opened.fileno(), content)
    os.replace(draft, file)
    sync_directory(file.parent)


def write_durably(descriptor: int, content: bytes) -> None:
    """Write all of ``content``; on disk when this returns."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Have the names in ``directory`` on disk when this returns."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
