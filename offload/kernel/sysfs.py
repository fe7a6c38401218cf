"""/sys as our network namespace has it.

/sys/class/net shows the devices of the namespace that it was mounted in, which need not be the one
that we are in: `nsenter --net` leaves /sys alone. So sysfs is mounted anew, attached to no directory.
Source: Documentation/filesystems/mount_api.rst; the system calls have been there since Linux 5.2.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/linux/mount.h
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def own_sysfs() -> Iterator[Path]:
    """A directory that is /sys with the network devices of the calling thread's namespace.

    It is gone when the body ends. Without CAP_SYS_ADMIN it is /sys itself. Raises ``OSError``.
    """
    try:
        mounted = _mount()
    except PermissionError:
        yield Path("/sys")
        return
    try:
        yield Path(f"/proc/self/fd/{mounted}")
    finally:
        os.close(mounted)


def _mount() -> int:
    """A file descriptor of a new mount of sysfs, which ends with it."""
    context = _call(_FSOPEN, b"sysfs", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
