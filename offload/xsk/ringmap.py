"""The memory of a ring, as the kernel gives it to mmap. This module does without NumPy."""

from __future__ import annotations

import ctypes as ct
import mmap

from . import libc
from .closing import Closing

_FLAGS = libc.MAP_SHARED | libc.MAP_POPULATE
_NOTHING = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
_PAGE = mmap.PAGESIZE


class RingMap(Closing):
    """A ring's words and entries in shared memory.

    ``producer`` and ``consumer`` count entries from 0 to 2**32 - 1 and on from 0; modulo ``size``, a power
    of two, they are places in the ring. ``flags`` has XDP_RING_NEED_WAKEUP. All three are live: see
    ``atomic`` before following one of them to an entry.

    ``close`` puts empty memory in the ring's place. So the kernel lets go of the socket at once, and a
    view of the ring that somebody still holds reads zeros instead of ending the process.
    """

    def __init__(
        self, fd: int, offset: int, fields: tuple[int, int, int, int], size: int, entry: int
    ) -> None:
        """``fields`` are XDP_MMAP_OFFSETS of this ring, ``entry`` is the size of an entry in bytes.

        Raises OSError: EINVAL when the ring is smaller than ``size``, or there is none.
        """
        self.size = size
        self.entries_at = fields[2]
        length = -(-(self.entries_at + size * entry) // _PAGE) * _PAGE
        self.memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        """Where the ring is mapped. Never unmapped while a view of it lives."""
        word = ct.c_uint32.from_buffer
        self.producer = word(self.memory, fields[0])
        self.consumer = word(self.memory, fields[1])
        self.flags = word(self.memory, fields[3])
        self._address = ct.addressof(ct.c_char.from_buffer(self.memory))
        try:
            libc.map_over(self._address, length, _FLAGS, fd, offset)
        except OSError:
            libc.map_over(self._address, length, _NOTHING)  # a failure has unmapped what Python holds
            raise
        self._mapped = True

    @property
    def filled(self) -> int:
        """Entries that are in the ring just now; may be asked by a process that does not use it."""
        consumer = self.consumer.value
        return min((self.producer.value - consumer) & 0xFFFFFFFF, self.size)

    def close(self) -> None:
        if self._mapped:
            self._mapped = False
            libc.map_over(self._address, len(self.memory), _NOTHING)
