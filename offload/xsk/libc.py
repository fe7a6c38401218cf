"""The system calls that Python's standard library does not have."""

from __future__ import annotations

import ctypes as ct
import os
import platform

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_POPULATE = 0x01, 0x02, 0x10, 0x20, 0x8000

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}

_libc = ct.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ct.c_void_p, ct.c_size_t, ct.c_int, ct.c_int, ct.c_int, ct.c_int64)
_libc.mmap.restype = ct.c_void_p
_FAILED = ct.c_void_p(-1).value


def bind(fd: int, address: bytes) -> None:
    """bind(2) with a raw ``struct sockaddr``; Python's own does not know AF_XDP. Raises OSError."""
    if _libc.bind(fd, address, len(address)) != 0:
        raise _error()


def map_over(address: int, length: int, flags: int, fd: int = -1, offset: int = 0) -> None:
    """mmap(2), to be read and written, in place of what is mapped at ``address``. Raises OSError."""
    found = _libc.mmap(address, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset)
    if found == _FAILED:
        raise _error()


def bpf(command: int, attributes: ct.Array[ct.c_char]) -> int:
    """bpf(2); the kernel may write to ``attributes``. Raises OSError."""
    number = _SYS_BPF[platform.machine()]
    result: int = _libc.syscall(
        ct.c_long(number), ct.c_long(command), ct.byref(attributes), ct.c_ulong(ct.sizeof(attributes))
    )
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ct.get_errno()
    return OSError(number, os.strerror(number))
