"""The four rings as NumPy arrays, without copying.

``span`` says which entries are yours, as a slice of the ring's arrays (``entries``, or a field of
it such as ``addr``); ``peek`` and ``reserve`` are the view itself. It is the ring's memory: yours
until ``release`` or ``submit``, the kernel's after that. It never reaches over the ring's end, so it
may be shorter than asked for even if there is more: give it back and ask again.

Addresses are signed here, though the kernel's are not (they stay below 2**63): NumPy
indexes with signed integers three times as fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import abi
from .atomic import Word, fence
from .ringmap import RingMap

DESCRIPTOR = np.dtype([("addr", np.int64), ("len", np.uint32), ("options", np.uint32)])
"""struct xdp_desc, the entry of RX and TX rings."""
ADDRESS = np.dtype(np.int64)
"""The entry of fill and completion rings."""

Entries = NDArray[Any]
Addresses = NDArray[np.int64]

_INDEX = 0xFFFFFFFF  # indices count to this and on from 0


class Ring:
    """What is common to both kinds. ``dtype`` is DESCRIPTOR or ADDRESS."""

    def __init__(self, ring: RingMap, dtype: np.dtype[Any]) -> None:
        self.size = ring.size
        self.entries: Entries = np.ndarray(ring.size, dtype, ring.memory, ring.entries_at)
        """All of the ring's memory."""
        self.raw: Entries = self.entries.view(f"V{dtype.itemsize}")
        """The same without fields, which copies five times as fast."""
        self.addr: Addresses = self.entries["addr"] if dtype is DESCRIPTOR else self.entries
        """The addresses in ``entries``."""
        self._mask = ring.size - 1
        self._flags = ring.flags
        self._producer = Word(ring.producer)
        self._consumer = Word(ring.consumer)

    @property
    def needs_wakeup(self) -> bool:
        """Whether the kernel wants to be woken to look at what was submitted."""
        fence()
        return bool(self._flags.value & abi.XDP_RING_NEED_WAKEUP)

    def _slice(self, index: int, count: int) -> slice:
        start = index & self._mask
        return slice(start, min(start + count, self.size))


class ConsumerRing(Ring):
    """A ring that the kernel writes: RX or completion."""

    def __init__(self, ring: RingMap, dtype: np.dtype[Any]) -> None:
        super().__init__(ring, dtype)
        self._mine = self._consumer.load()
        self._theirs = self._producer.load()

    def available(self, wanted: int = 1) -> int:
        """Entries to read; looks at the kernel's index only when fewer than ``wanted`` are known."""
        count = (self._theirs - self._mine) & _INDEX
        if count < wanted:
            self._theirs = self._producer.load()
            count = (self._theirs - self._mine) & _INDEX
        return count

    def span(self, count: int) -> slice:
        """Where the next entries are, ``count`` at most."""
        return self._slice(self._mine, min(count, self.available(count)))

    def peek(self, count: int) -> Entries:
        """A view of the next entries, ``count`` at most."""
        return self.entries[self.span(count)]

    def release(self, count: int) -> None:
        """Give the first ``count`` entries back to the kernel. Raises ValueError beyond those available."""
        if not 0 <= count <= (self._theirs - self._mine) & _INDEX:
            raise ValueError(f"{count} entries cannot be released: they were not available")
        self._mine = (self._mine + count) & _INDEX
        self._consumer.store(self._mine)

    def take(self, count: int) -> Entries:
        """A copy of the next entries, ``count`` at most, without fields; they are released."""
        count = min(count, self.available(count))
        first = self._slice(self._mine, count)
        found = self.raw[first]
        missing = count - len(found)
        found = np.concatenate((found, self.raw[:missing])) if missing else found.copy()
        self.release(count)
        return found


class ProducerRing(Ring):
    """A ring that the kernel reads: fill or TX."""

    def __init__(self, ring: RingMap, dtype: np.dtype[Any]) -> None:
        super().__init__(ring, dtype)
        self._mine = self._producer.load()
        self._theirs = self._consumer.load()

    def free(self, wanted: int = 1) -> int:
        """Entries to write; looks at the kernel's index only when fewer than ``wanted`` are known."""
        count = self.size - ((self._mine - self._theirs) & _INDEX)
        if count < wanted:
            self._theirs = self._consumer.load()
            count = self.size - ((self._mine - self._theirs) & _INDEX)
        return count

    def span(self, count: int) -> slice:
        """Where the next free entries are, ``count`` at most."""
        return self._slice(self._mine, min(count, self.free(count)))

    def reserve(self, count: int) -> Entries:
        """A view of the next free entries, ``count`` at most, to be written."""
        return self.entries[self.span(count)]

    def submit(self, count: int) -> None:
        """Give the first ``count`` entries to the kernel. Raises ValueError beyond those that were free."""
        if not 0 <= count <= self.size - ((self._mine - self._theirs) & _INDEX):
            raise ValueError(f"{count} entries cannot be submitted: they were not free")
        self._mine = (self._mine + count) & _INDEX
        self._producer.store(self._mine)

    def put(self, values: Entries) -> int:
        """Submit as many of ``values`` (addresses, or raw entries) as there is room for; returns how many."""
        count = min(len(values), self.free(len(values)))
        first = self._slice(self._mine, count)
        split = first.stop - first.start
        target = self.addr if values.dtype == ADDRESS else self.raw
        target[first] = values[:split]
        if split < count:
            target[: count - split] = values[split:count]
        self.submit(count)
        return count
