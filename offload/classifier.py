"""The writer of the filter table that ``bpf/classifier.h`` describes.

The table is a memory-mapped BPF array that programs read on other CPUs while it
changes. The rules that keep them right, each of them relied on in the C:

* A slot is one aligned 64-bit word and is stored in one piece: assigning to an
  element of a ``memoryview`` cast to ``Q`` is one 8-byte store on the 64-bit
  machines that Linux runs XDP on. Key and value change together.
* A key that must make room is first written to its other bucket, then its old
  slot is overwritten: at no moment is it in neither. Stores of one thread reach other
  CPUs in order, and loads are made in order, on x86-64; other machines need more than this.
* No key is displaced twice without a grace period in between, in which every program that
  was running has ended. Removed slots may be used again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .errors import OffloadError

BUCKET_BITS = 15
BUCKETS = 1 << BUCKET_BITS
BUCKET_SLOTS = 4
VALUE_BITS = 18
KEY_BITS = 60
CAPACITY = 65_536
"""Filters per NIC that are promised to fit; the table has twice as many slots."""

_KEY_MASK = (1 << KEY_BITS) - 1
_BUCKET_MASK = BUCKETS - 1
_VALUE_MASK = (1 << VALUE_BITS) - 1
_MIX_FACTOR = 0x9E3779B97F4A7C5
_MIX_SHIFT = 30
_FOLD_SHIFT = 45
_UNMIX_FACTOR = pow(_MIX_FACTOR, -1, 1 << KEY_BITS)
_SEARCH_LIMIT = 2_000
"""Buckets looked at for a free slot before giving up; at half load a handful is enough."""


class TableFullError(OffloadError):
    """No slot could be made free for a filter."""


def filter_key(mac: str, vid: int) -> int:
    """The 60-bit key of a MAC (six hex bytes with colons) and a VID (0..4094)."""
    return int.from_bytes(bytes.fromhex(mac.replace(":", "")), "little") | vid << 48


def filter_of(key: int) -> tuple[str, int]:
    """MAC and VID of a key: the inverse of ``filter_key``."""
    return (key & 0xFFFFFFFFFFFF).to_bytes(6, "little").hex(":"), key >> 48


def mix(key: int) -> int:
    """A bijection of 60-bit numbers; the same as in ``classifier.h``."""
    key ^= key >> _MIX_SHIFT
    key = key * _MIX_FACTOR & _KEY_MASK
    return key ^ key >> _FOLD_SHIFT


def unmix(mixed: int) -> int:
    """The inverse of ``mix``. (A shift by half the width or more is undone by itself.)"""
    mixed ^= mixed >> _FOLD_SHIFT
    mixed = mixed * _UNMIX_FACTOR & _KEY_MASK
    return mixed ^ mixed >> _MIX_SHIFT


def _other_bucket(bucket: int, remainder: int) -> int:
    """First bucket to second, and back."""
    return (bucket ^ (remainder | 1)) & _BUCKET_MASK


class Classifier:
    """The filters of one NIC, over the words of its mapped table.

    ``words`` holds ``BUCKETS * BUCKET_SLOTS`` unsigned 64-bit words. ``grace`` returns once
    every program that ran when it was called has ended; it may take 10 ms, and is called only
    before a key would be displaced a second time.
    """

    def __init__(
        self,
        words: memoryview,
        grace: Callable[[], None],
    ) -> None:
        if words.format != "Q" or len(words) < BUCKETS * BUCKET_SLOTS:
            raise ValueError("a filter table is a sequence of 64-bit words")
        self._words = words
        self._grace = grace
        self._displaced: set[int] = set()
        self._size = len({key for key, _ in self})

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every key with its port id, read back from the table itself."""
        for index, word in enumerate(self._words):
            if word:
                yield self._key_at(index, word), (word & _VALUE_MASK) - 1

    def get(self, key: int) -> int | None:
        """The port id of ``key``, or ``None``."""
        slots = self._slots_of(key)
        return (self._words[slots[0]] & _VALUE_MASK) - 1 if slots else None

    def set(self, key: int, port: int) -> None:
        """Make frames of ``key`` belong to ``port``, in one store for a key that is there already.

        Raises ``TableFullError`` when there is no room; the table is then as it was.
        """
        if not 0 <= port < _VALUE_MASK or not 0 <= key <= _KEY_MASK:
            raise ValueError(f"filter {key:#x} of port {port} is out of range")
        slots = self._slots_of(key)
        if not slots:
            slots = [self._make_room(mix(key))]
            self._size += 1
        for copy in slots[1:]:
            self._words[copy] = 0
        self._words[slots[0]] = self._tag_at(slots[0], key) | port + 1

    def remove(self, key: int) -> None:
        """Forget ``key``; nothing happens when it is not there."""
        slots = self._slots_of(key)
        for index in slots:
            self._words[index] = 0
        if slots:
            self._size -= 1
            self._displaced.discard(key)  # no reader can demand it any more

    def _slots_of(self, key: int) -> list[int]:
        """Where ``key`` is. Twice only if a writer was killed in the middle of displacing it."""
        mixed = mix(key)
        bucket, remainder = mixed & _BUCKET_MASK, mixed >> BUCKET_BITS
        slots = []
        for choice, at in enumerate((bucket, _other_bucket(bucket, remainder))):
            tag = remainder << 1 | choice
            for index in range(at * BUCKET_SLOTS, (at + 1) * BUCKET_SLOTS):
                word = self._words[index]
                if word >> VALUE_BITS == tag and word:
                    slots.append(index)
        return slots

    def _tag_at(self, index: int, key: int) -> int:
        mixed = mix(key)
        choice = index // BUCKET_SLOTS != mixed & _BUCKET_MASK
        return (mixed >> BUCKET_BITS << 1 | choice) << VALUE_BITS

    def _key_at(self, index: int, word: int) -> int:
        bucket, remainder = index // BUCKET_SLOTS, word >> VALUE_BITS + 1
        if word >> VALUE_BITS & 1:
            bucket = _other_bucket(bucket, remainder)
        return unmix(remainder << BUCKET_BITS | bucket)

    def _free_slot(self, bucket: int) -> int | None:
        for index in range(bucket * BUCKET_SLOTS, (bucket + 1) * BUCKET_SLOTS):
            if not self._words[index]:
                return index
        return None

    def _make_room(self, mixed: int) -> int:
        """The index of a free slot for a key, other keys displaced where both its buckets are full."""
        first = mixed & _BUCKET_MASK
        start = (first, _other_bucket(first, mixed >> BUCKET_BITS))
        for bucket in start:
            if (free := self._free_slot(bucket)) is not None:
                return free
        return self._displace(self._path_to_free_slot(start))

    def _path_to_free_slot(self, start: tuple[int, ...]) -> list[int]:
        """Slots to shift along, the free one last: the shortest such path (breadth first)."""
        came_from: dict[int, int | None] = dict.fromkeys(start)  # bucket -> the slot that leads to it
        waiting = deque(start)
        for _ in range(_SEARCH_LIMIT):
            if not waiting:
                break
            bucket = waiting.popleft()
            for index in range(bucket * BUCKET_SLOTS, (bucket + 1) * BUCKET_SLOTS):
                other = _other_bucket(bucket, self._words[index] >> VALUE_BITS + 1)
                if other in came_from:
                    continue
                came_from[other] = index
                if (free := self._free_slot(other)) is None:
                    waiting.append(other)
                    continue
                path = [free]
                step: int | None = index
                while step is not None:
                    path.append(step)
                    step = came_from[step // BUCKET_SLOTS]
                return path[::-1]
        raise TableFullError(
            f"the filter table has no room: {self._size} filters, {CAPACITY} are promised to fit; "
            "use fewer MAC and VLAN pairs on this NIC"
        )

    def _displace(self, path: list[int]) -> int:
        """Shift every key on the path one step on, last first; the path's first slot becomes free.

        Each key is in its new slot before it leaves the old one. The freed slot is
        emptied, so that a reader who sees it sees no key twice with two values.
        """
        keys = {self._key_at(index, self._words[index]) for index in path[:-1]}
        if not keys.isdisjoint(self._displaced):
            self._grace()
            self._displaced.clear()
        self._displaced |= keys
        for source, target in zip(path[-2::-1], path[:0:-1], strict=True):
            word = self._words[source]
            self._words[target] = word ^ 1 << VALUE_BITS  # the same key, its other choice
            self._words[source] = 0
        return path[0]
