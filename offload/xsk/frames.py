"""The chunks of a UMEM: which of them are free, and views of what is in them.

An address is a place in the UMEM, in bytes from its start. In an unaligned UMEM the kernel's
addresses carry an offset in their upper 16 bits: ``data`` adds it, ``base`` takes it away.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import abi
from .rings import ADDRESS, Addresses
from .umem import Umem, UmemShape

ETHERNET = np.dtype([("dst", "V6"), ("src", "V6"), ("ethertype", ">u2")])
"""An Ethernet header. Its MACs are opaque values: compare and copy them, ``bytes()`` reads one."""


class Frames:
    """A UMEM's chunks, for one thread. Sockets that share the UMEM share this, too.

    ``free`` chunks are nobody's. Those that ``take`` gives out are the caller's, until they are
    given back or put into a fill or TX ring.
    """

    def __init__(self, umem: Umem, held: Addresses | None = None) -> None:
        """All chunks are free but those at the addresses ``held``."""
        self.shape: UmemShape = umem.shape
        self.memory: mmap.mmap = umem.memory
        self.bytes: NDArray[np.uint8] = np.frombuffer(umem.memory, np.uint8, umem.shape.size)
        """All of the UMEM."""
        everything = np.arange(self.shape.frames, dtype=ADDRESS) * self.shape.chunk_size
        if held is not None:
            everything = np.setdiff1d(everything, self.base(held))
        self._free = np.empty(self.shape.frames, ADDRESS)
        self.free = 0
        """How many chunks are free."""
        self.give(everything[::-1])

    def take(self, count: int) -> Addresses:
        """Addresses of free chunks, ``count`` at most, which are the caller's now."""
        count = min(count, self.free)
        self.free -= count
        return self._free[self.free : self.free + count].copy()

    def give(self, addresses: Addresses) -> None:
        """Free chunks, by any address in each of them. Raises ValueError when there are not so many."""
        after = self.free + len(addresses)
        if after > len(self._free):
            raise ValueError("more chunks were given back than there are")
        self._free[self.free : after] = self.base(addresses)
        self.free = after

    def base(self, addresses: Addresses) -> Addresses:
        """Where the chunks of these addresses begin."""
        unaligned = self.shape.unaligned
        mask = abi.XSK_UNALIGNED_BUF_ADDR_MASK if unaligned else -self.shape.chunk_size
        return addresses & mask

    def data(self, addresses: Addresses) -> Addresses:
        """Where the frames of these descriptors' addresses begin."""
        if not self.shape.unaligned:
            return addresses
        return self.base(addresses) + (addresses >> abi.XSK_UNALIGNED_BUF_OFFSET_SHIFT)

    def at(self, dtype: DTypeLike) -> NDArray[Any]:
        """Records of ``dtype`` at *every* byte of the UMEM, without copying: index it with addresses.

        ``frames.at(ETHERNET)["dst"][addresses]`` are the destinations of many frames at once, and an
        assignment to that writes them. Make it once, as a field of it, and use it often.
        """
        kind = np.dtype(dtype)
        count = self.shape.size - kind.itemsize + 1
        return np.ndarray((count,), kind, self.memory, 0, (1,))

    def copy(self, source: Frames, addresses: Addresses, lengths: NDArray[np.uint32]) -> Addresses:
        """Copy what lies at these addresses of another UMEM to free chunks of this one; returns theirs.

        There must be as many. Raises ValueError for what is longer than a chunk.
        """
        width = int(lengths.max())
        if width > self.shape.chunk_size:
            raise ValueError(f"{width} bytes do not fit a chunk of {self.shape.chunk_size}")
        chunks = self.take(len(addresses))
        # All in one go, as many bytes of each as of the longest; but not over the end of the memory.
        inside = (addresses <= source.shape.size - width) & (chunks <= self.shape.size - width)
        self.at(f"V{width}")[chunks[inside]] = source.at(f"V{width}")[addresses[inside]]
        rest = (part[~inside].tolist() for part in (chunks, addresses, lengths))
        for to, at, length in zip(*rest, strict=True):
            self.memory[to : to + length] = source.memory[at : at + length]
        return chunks
