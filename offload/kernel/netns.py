"""Work in another network namespace, from a thread that ends with the work.

setns(2) moves only the calling thread, so the rest of the process stays where it is. Sockets
that are opened in the thread belong to the other namespace for as long as they live.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
OWN_NETNS = "/proc/self/ns/net"

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def call_in(netns: str, func: Callable[[], T]) -> T:
    """Return ``func()`` as run in the network namespace behind the path ``netns``.

    Raises what ``func`` raises, and ``OSError`` when the namespace cannot be opened or entered
    (EPERM without CAP_SYS_ADMIN).
    """

    def body() -> T:
        _enter(netns)
        return func()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as thread:
        return thread.submit(body).result()


def identity(netns: str) -> tuple[int, int]:
    """Device and inode of a namespace file: equal for the same namespace, however it is named."""
    found = os.stat(netns)
    return found.st_dev, found.st_ino


def _enter(netns: str) -> None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), netns)
    finally:
        os.close(fd)
