"""Work in another network namespace, and make one that outlives the process.

What changes a namespace changes the calling thread alone, so all of it is done in threads that end
with the work. Sockets that are opened in such a thread belong to the other namespace for as long as
they live.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

# include/uapi/linux/sched.h and mount.h
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
MNT_DETACH = 2

OWN_NETNS = "/proc/self/ns/net"
_OWN_MOUNTS, _MOUNTS_OF_INIT = "/proc/self/ns/mnt", "/proc/1/ns/mnt"
_THIS = b"/proc/thread-self/ns/net"

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def call_in(netns: str, func: Callable[[], T]) -> T:
    """Return ``func()`` as run in the network namespace behind the path ``netns``.

    Raises what ``func`` raises, and ``OSError`` when the namespace cannot be opened or entered
    (EPERM without CAP_SYS_ADMIN).
    """

    def body() -> T:
        _enter(netns, CLONE_NEWNET)
        return func()

    return _in_thread(body)


def identity(netns: str) -> tuple[int, int]:
    """Device and inode of a namespace file: equal for the same namespace, however it is named."""
    found = os.stat(netns)
    return found.st_dev, found.st_ino


def keep_new(path: Path) -> None:
    """Make a network namespace that stays until ``let_go``: a mount at ``path``, as ip-netns(8) makes.

    The mount is made where PID 1 lives: a service may have mounts of its own, which end with it.
    Raises ``OSError`` (EPERM without CAP_SYS_ADMIN and CAP_SYS_CHROOT).
    """

    def body() -> None:
        _check(_libc.unshare(CLONE_FS | CLONE_NEWNET), "a new network namespace")
        _mount_as_init()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o400)
        _check(_libc.mount(_THIS, os.fsencode(path), b"none", MS_BIND, None), str(path))

    _in_thread(body)


def let_go(path: Path) -> None:
    """End what ``keep_new`` keeps: the namespace goes when nobody is in it any more. Idempotent."""

    def body() -> None:
        _check(_libc.unshare(CLONE_FS), "own mounts")
        _mount_as_init()
        if is_kept(path):
            _check(_libc.umount2(os.fsencode(path), MNT_DETACH), str(path))
        path.unlink(missing_ok=True)

    _in_thread(body)


def is_kept(path: Path) -> bool:
    """Whether a namespace is kept at ``path``: an ordinary file there is left of an attempt."""
    try:
        return os.stat(as_init_sees(path)).st_dev == os.stat(OWN_NETNS).st_dev
    except FileNotFoundError:
        return False


def as_init_sees(path: Path) -> str:
    """``path`` where PID 1 lives, for mounts of ``keep_new`` that do not show in our own mount namespace."""
    return f"/proc/1/root{path}" if _apart_from_init(_OWN_MOUNTS) else str(path)


def _apart_from_init(own: str) -> bool:
    """Whether PID 1 has other mounts. In some containers it may not be asked: then ours have to do."""
    try:
        return identity(own) != identity(_MOUNTS_OF_INIT)
    except PermissionError:
        return False


def _mount_as_init() -> None:
    if _apart_from_init("/proc/thread-self/ns/mnt"):
        _enter(_MOUNTS_OF_INIT, CLONE_NEWNS)


def _in_thread(body: Callable[[], T]) -> T:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as thread:
        return thread.submit(body).result()


def _enter(namespace: str, kind: int) -> None:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, kind), namespace)
    finally:
        os.close(fd)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
