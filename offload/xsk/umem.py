"""UMEM: the memory that a program and the kernel share, where the frames are.

A UMEM is a row of *chunks* of one size, each of which holds a frame. It lives in a memfd, so that its
memory can be handed to another process together with the socket that uses it.

This module does without NumPy.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Self

from . import abi
from .closing import Closing
from .errors import explain

HUGE_PAGE = 2 << 20
"""Bytes of a huge page: the default size of x86-64, and of arm64 with pages of 4 KiB."""

# include/uapi/linux/memfd.h and fcntl.h, as far as Python 3.11 lacks them
_MFD_HUGE_2MB = 21 << 26
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK, _F_SEAL_GROW = 2, 4

_REMEDIES = {
    errno.ENOMEM: "Make the UMEM smaller, or reserve more huge pages (sysctl vm.nr_hugepages)",
    errno.ENOSYS: "This kernel has no memfd_create",
}


@dataclass(frozen=True)
class UmemShape:
    """How a UMEM is divided.

    frames      number of chunks
    chunk_size  bytes of one: 2048 or 4096; with ``unaligned`` anything between 2048 and a page
    headroom    bytes left free before each received frame, beyond the 256 that the kernel leaves anyway
    unaligned   frames need not lie within a chunk's bounds (XDP_UMEM_UNALIGNED_CHUNK_FLAG)

    A received frame, or each part of it with multi-buffer, has ``room`` bytes at most.
    Raises ValueError for what the kernel would refuse.
    """

    frames: int = 4096
    chunk_size: int = 2048
    headroom: int = 0
    unaligned: bool = False

    def __post_init__(self) -> None:
        low, high = abi.XDP_UMEM_MIN_CHUNK_SIZE, mmap.PAGESIZE
        if not low <= self.chunk_size <= high:
            raise ValueError(f"chunk_size is {self.chunk_size}: from {low} to {high} bytes are allowed")
        if not self.unaligned and self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"chunk_size is {self.chunk_size}: must be a power of two unless unaligned")
        if self.frames < 1:
            raise ValueError(f"frames is {self.frames}: must be 1 or more")
        if self.headroom < 0 or self.room < 1:
            raise ValueError(f"headroom is {self.headroom}: leaves no room in a chunk of {self.chunk_size}")

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        return self.frames * self.chunk_size

    @property
    def room(self) -> int:
        """Bytes of a chunk that a received frame can have."""
        return self.chunk_size - abi.XDP_PACKET_HEADROOM - self.headroom


class Umem(Closing):
    """The memory of a UMEM. It is registered with the kernel by the first socket that is bound to it.

    ``huge_pages`` takes pages of 2 MiB, which the host must have reserved: fewer TLB misses.

    ``close`` lets go of the memory here. It is freed when no socket, no other process and no view
    of it is left: views that are still held stay valid.

    Raises LimitError when there is not enough memory.
    """

    def __init__(self, shape: UmemShape | None = None, *, huge_pages: bool = False) -> None:
        shape = shape or UmemShape()
        page = HUGE_PAGE if huge_pages else mmap.PAGESIZE
        size = -(-shape.size // page) * page
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if huge_pages:
            flags |= os.MFD_HUGETLB | _MFD_HUGE_2MB
        try:
            fd = os.memfd_create("umem", flags)
        except OSError as error:
            raise explain(error.errno or 0, "make memory for a UMEM", _REMEDIES) from error
        try:
            os.ftruncate(fd, size)
            # Whoever gets the memory must not be able to pull it from under the others.
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            self._take(fd, shape)
        except OSError as error:
            os.close(fd)
            raise explain(error.errno or 0, f"make a UMEM of {size} bytes", _REMEDIES) from error

    @classmethod
    def adopt(cls, fd: int, shape: UmemShape) -> Self:
        """The UMEM that another process made; takes over ``fd``, its memfd.

        Raises ValueError when the memory is smaller than ``shape`` says.
        """
        umem = cls.__new__(cls)
        try:
            size = os.fstat(fd).st_size
            if size < shape.size:
                raise ValueError(f"the memory has {size} bytes, and the UMEM's shape needs {shape.size}")
            umem._take(fd, shape)
        except BaseException:
            os.close(fd)
            raise
        return umem

    def _take(self, fd: int, shape: UmemShape) -> None:
        self.shape = shape
        # All of the file, as huge pages can only be unmapped whole.
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)
        """The chunks, one after the other; huge pages may leave unused bytes behind them."""
        self.fd = fd
        """The memfd, or -1 after ``close``."""
        self.registrar = -1
        """The socket that registered this UMEM with the kernel and can share it, or -1."""

    @property
    def address(self) -> int:
        """Where the memory is in this process."""
        return ct.addressof(ct.c_char.from_buffer(self.memory))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.memory
