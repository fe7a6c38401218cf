"""The filter table's writer against a dict, and against every reader that there can be.

The readers here follow ``bpf/classifier.h`` word by word: first bucket, second bucket, first again.
A reader may stop between any two of its twelve reads for as long as it likes, but not beyond a
grace period. ``outcomes`` works out everything that such a reader can come to find.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.classifier import (
    BUCKET_BITS,
    BUCKET_SLOTS,
    BUCKETS,
    CAPACITY,
    KEY_BITS,
    VALUE_BITS,
    Classifier,
    TableFullError,
    filter_key,
    filter_of,
    mix,
    unmix,
)

WORDS = BUCKETS * BUCKET_SLOTS
ARENA = 8
"""Buckets that the crowded tests play in: 32 slots, for keys that live nowhere else."""

keys60 = st.integers(0, (1 << KEY_BITS) - 1)


def key_in(first: int, second: int, number: int = 0) -> int:
    """A key whose buckets are ``first`` and ``second`` (one even, one odd), another for each ``number``."""
    assert (first ^ second) & 1, "a key's two buckets differ in their last bit"
    return unmix((number << BUCKET_BITS | first ^ second) << BUCKET_BITS | first)


def arena_keys(copies: int) -> list[int]:
    """Keys for every pair of buckets of the arena."""
    pairs = [(a, b) for a in range(ARENA) for b in range(ARENA) if (a ^ b) & 1]
    return [key_in(first, second, copy) for first, second in pairs for copy in range(copies)]


def empty_table() -> memoryview:
    return memoryview(array("Q", bytes(8 * WORDS)))


def buckets_of(key: int) -> tuple[int, int]:
    """First and second bucket, as ``first_bucket`` and ``second_bucket`` in C have them."""
    mixed = mix(key)
    return mixed & (BUCKETS - 1), (mixed ^ (mixed >> BUCKET_BITS | 1)) & (BUCKETS - 1)


def value_in(word: int, key: int, choice: int) -> int | None:
    """What ``search_bucket`` takes from one slot."""
    tag = mix(key) >> BUCKET_BITS << (VALUE_BITS + 1) | choice << VALUE_BITS
    rest = word ^ tag
    return rest - 1 if 0 < rest < 1 << VALUE_BITS else None


def reads_of(key: int) -> list[tuple[int, int]]:
    """Word index and choice of each read of a lookup, in the C's order."""
    first, second = buckets_of(key)
    return [
        (bucket * BUCKET_SLOTS + slot, choice)
        for bucket, choice in ((first, 0), (second, 1), (first, 0))
        for slot in range(BUCKET_SLOTS)
    ]


def outcomes(key: int, snapshots: Sequence[dict[int, int]]) -> set[int | None]:
    """Every answer that some reader can get while the table goes through ``snapshots``.

    A reader is at a read no earlier than at its last one. What it can reach is therefore told by
    one number: the earliest snapshot at which it can have come this far without finding anything.
    """
    found: set[int | None] = set()
    earliest = 0
    for index, choice in reads_of(key):
        seen = [value_in(snapshot.get(index, 0), key, choice) for snapshot in snapshots[earliest:]]
        found |= {value for value in seen if value is not None}
        if None not in seen:
            return found
        earliest += seen.index(None)
    return found | {None}


def locate(words: Iterable[tuple[int, int]], key: int) -> list[int]:
    """The slots in which a key is."""
    spots = dict(reads_of(key))
    return [
        index for index, word in words if index in spots and value_in(word, key, spots[index]) is not None
    ]


@dataclass
class RecordingWords:
    """The words of a table, with every store that was made; stands in for a memoryview."""

    words: dict[int, int] = field(default_factory=dict)
    snapshots: list[dict[int, int]] = field(default_factory=lambda: [{}])
    format: str = "Q"

    def __len__(self) -> int:
        return WORDS

    def __iter__(self) -> Iterator[int]:
        return (self.words.get(index, 0) for index in range(WORDS))

    def __getitem__(self, index: int) -> int:
        return self.words.get(index, 0)

    def __setitem__(self, index: int, word: int) -> None:
        self.words[index] = word
        self.snapshots.append(dict(self.words))


class History:
    """A classifier, a dict that does the same, and what readers may see meanwhile.

    A *span* is a stretch between two grace periods: the longest time that one lookup can last.
    ``held`` notes for every snapshot of it what the dict had: ``None`` while an operation is under way.
    """

    def __init__(self, table: type[Classifier] = Classifier) -> None:
        self.words = RecordingWords()
        self.graces = 0
        self.displacements = 0
        self.model: dict[int, int] = {}
        self.present_since: dict[int, int] = {}
        self.displaced: set[int] = set()
        self.table = table(cast(memoryview, self.words), self._grace)

    def _grace(self) -> None:
        self.graces += 1
        self.displaced.clear()
        for key in self.model:
            self.check(key)
        self.words.snapshots = [dict(self.words.words)]
        self.present_since = dict.fromkeys(self.model, 0)

    def check(self, key: int) -> None:
        """No reader that began after ``key`` came, or after the last grace period, misses it now."""
        seen = outcomes(key, self.words.snapshots[self.present_since[key] :])
        assert seen == {self.model[key]}, f"{key:#x} should be {self.model[key]}, readers see {seen}"

    def set(self, key: int, port: int) -> None:
        before, start = self.model.get(key), len(self.words.snapshots) - 1
        places = {other: self._place(other) for other in self.model}
        had = dict(self.words.words)
        try:
            self.table.set(key, port)
        except TableFullError:
            assert {i: w for i, w in self.words.words.items() if w} == {i: w for i, w in had.items() if w}
            assert len(self.table) == len(self.model)
            return
        self._note_displacements(places)
        self.model[key] = port
        start = min(start, len(self.words.snapshots) - 1)
        assert outcomes(key, self.words.snapshots[start:]) <= {before, port}
        self.present_since[key] = len(self.words.snapshots) - 1

    def remove(self, key: int) -> None:
        start = len(self.words.snapshots) - 1
        before = self.model.pop(key, None)
        self.table.remove(key)
        self.present_since.pop(key, None)
        self.displaced.discard(key)
        assert outcomes(key, self.words.snapshots[start:]) <= {before, None}

    def _place(self, key: int) -> int:
        places = locate(self.words.words.items(), key)
        assert len(places) == 1, f"{key:#x} is in {len(places)} slots"
        return places[0]

    def _note_displacements(self, before: dict[int, int]) -> None:
        moved = {key for key, place in before.items() if self._place(key) != place}
        assert not moved & self.displaced, "displaced twice without a grace period in between"
        self.displaced |= moved
        self.displacements += len(moved)

    def check_everything(self, universe: Iterable[int]) -> None:
        for key in self.model:
            self.check(key)
        for key in universe:
            assert self.table.get(key) == self.model.get(key)
        assert dict(self.table) == self.model
        assert len(self.table) == len(self.model)


@given(keys60)
def test_mix_is_undone_by_unmix(key: int) -> None:
    assert 0 <= mix(key) < 1 << KEY_BITS
    assert unmix(mix(key)) == key
    assert mix(unmix(key)) == key


@given(keys60, st.integers(0, 4094))
def test_a_filter_is_a_key_and_back(number: int, vid: int) -> None:
    mac = (number & 0xFFFFFFFFFFFF).to_bytes(6, "big").hex(":")
    assert filter_of(filter_key(mac, vid)) == (mac, vid)


def test_the_key_has_the_mac_as_the_wire_has_it() -> None:
    assert filter_key("02:15:5d:00:00:01", 10) == 10 << 48 | 0x0100005D1502


@given(keys60)
def test_a_key_has_two_buckets_and_the_second_leads_back(key: int) -> None:
    first, second = buckets_of(key)
    assert first != second
    remainder = mix(key) >> BUCKET_BITS
    assert (second ^ (remainder | 1)) & (BUCKETS - 1) == first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(keys60, st.integers(0, (1 << VALUE_BITS) - 2)), max_size=40), st.randoms())
def test_it_behaves_as_a_dict(entries: list[tuple[int, int]], rng: random.Random) -> None:
    table = Classifier(empty_table(), lambda: None)
    model: dict[int, int] = {}
    for key, port in entries:
        table.set(key, port)
        model[key] = port
        if rng.random() < 0.3:
            gone = rng.choice(list(model))
            table.remove(gone)
            del model[gone]
    assert dict(table) == model
    assert all(table.get(key) == model.get(key) for key, _ in entries)


def test_what_is_in_the_table_is_adopted() -> None:
    words = empty_table()
    Classifier(words, lambda: None).set(5, 6)
    again = Classifier(words, lambda: None)
    assert (len(again), again.get(5), list(again)) == (1, 6, [(5, 6)])
    again.remove(5)
    assert not any(words)


@pytest.fixture
def torn() -> tuple[memoryview, int]:
    """A table whose writer was killed in the middle of a displacement, and the key that has two slots."""
    words = empty_table()
    key = key_in(2, 5)
    Classifier(words, lambda: None).set(key, 7)
    words[5 * BUCKET_SLOTS] = words[2 * BUCKET_SLOTS] ^ 1 << VALUE_BITS
    return words, key


def test_a_key_in_two_slots_is_one_filter(torn: tuple[memoryview, int]) -> None:
    words, key = torn
    before = bytes(words)
    table = Classifier(words, lambda: None)
    assert (len(table), dict(table), table.get(key)) == (1, {key: 7}, 7)
    assert bytes(words) == before, "who only looks changes nothing: another process may be writing"


def test_a_key_in_two_slots_is_removed_from_both(torn: tuple[memoryview, int]) -> None:
    words, key = torn
    table = Classifier(words, lambda: None)
    table.remove(key)
    assert (len(table), any(words)) == (0, False)


def test_a_key_in_two_slots_gets_one_value(torn: tuple[memoryview, int]) -> None:
    words, key = torn
    table = Classifier(words, lambda: None)
    table.set(key, 8)
    assert (len(table), list(table)) == (1, [(key, 8)])


@pytest.mark.parametrize(
    ("key", "port"),
    [(1 << KEY_BITS, 0), (-1, 0), (0, -1), (0, (1 << VALUE_BITS) - 1)],
    ids=["key too large", "key negative", "port negative", "port too large"],
)
def test_what_does_not_fit_a_slot_is_refused(key: int, port: int) -> None:
    words = empty_table()
    with pytest.raises(ValueError, match="out of range"):
        Classifier(words, lambda: None).set(key, port)
    assert not any(words)


@pytest.mark.parametrize("words", [memoryview(bytearray(8 * WORDS)), memoryview(array("Q", bytes(800)))])
def test_a_table_of_another_shape_is_refused(words: memoryview) -> None:
    with pytest.raises(ValueError, match="sequence of 64-bit words"):
        Classifier(words, lambda: None)


def crowd(history: History, seed: int, operations: int, keys: Sequence[int]) -> None:
    """Fill the arena to its brim and stir it."""
    rng = random.Random(seed)
    for _ in range(operations):
        key = rng.choice(keys)
        if key in history.model and rng.random() < 0.7:
            history.remove(key)
        else:
            history.set(key, rng.randrange(1000))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 32))
def test_no_reader_misses_a_key_or_sees_another_value(seed: int) -> None:
    """All interleavings of a lookup with whatever is stored during it, up to the next grace period."""
    history = History()
    keys = arena_keys(copies=2)
    crowd(history, seed, 250, keys)
    history.check_everything(keys)
    assert history.displacements > 20


def caught(table: type[Classifier]) -> bool:
    """Whether the readers of this module notice what is wrong with a writer."""
    try:
        for seed in range(20):
            history = History(table)
            crowd(history, seed, 250, arena_keys(copies=2))
            history.check_everything(arena_keys(copies=2))
    except AssertionError:
        return True
    return False


class ClearsFirst(Classifier):
    """Wrong: a displaced key is in neither bucket for a moment."""

    def _displace(self, path: list[int]) -> int:
        for source, target in zip(path[-2::-1], path[:0:-1], strict=True):
            word = self._words[source]
            self._words[source] = 0
            self._words[target] = word ^ 1 << VALUE_BITS
        return path[0]


class NeverWaits(Classifier):
    """Wrong: a key goes to its other bucket and back during one lookup."""

    def _displace(self, path: list[int]) -> int:
        self._displaced.clear()
        return super()._displace(path)


class CopiesNothing(Classifier):
    """Wrong: the choice bit is forgotten, so a displaced key looks like another one."""

    def _displace(self, path: list[int]) -> int:
        for source, target in zip(path[-2::-1], path[:0:-1], strict=True):
            self._words[target] = self._words[source]
            self._words[source] = 0
        return path[0]


@pytest.mark.parametrize("table", [ClearsFirst, NeverWaits, CopiesNothing])
def test_a_writer_that_breaks_a_rule_is_caught(table: type[Classifier]) -> None:
    assert caught(table)


def test_a_key_that_cannot_be_placed_leaves_the_table_as_it_was() -> None:
    words = empty_table()
    table = Classifier(words, lambda: None)
    keys = [key_in(2, 5, number) for number in range(2 * BUCKET_SLOTS + 1)]
    for port, key in enumerate(keys[:-1]):
        table.set(key, port)
    before = bytes(words)
    with pytest.raises(TableFullError, match="no room: 8 filters"):
        table.set(keys[-1], 99)
    assert bytes(words) == before
    assert (len(table), table.get(keys[-1])) == (8, None)
    table.set(keys[0], 77)  # a key that is there needs no room
    assert table.get(keys[0]) == 77


def test_a_long_path_is_shifted_from_its_end() -> None:
    """Buckets 0 to 5 are full and lead on to each other; only bucket 6 has room."""
    history = History()
    for first, second in pairwise(range(7)):
        for number in range(BUCKET_SLOTS):
            history.set(key_in(first, second, number), first)
    assert all(locate(history.words.words.items(), key)[0] // BUCKET_SLOTS < 6 for key in history.model)
    newcomer = key_in(0, 1, BUCKET_SLOTS)
    history.set(newcomer, 42)
    assert history.displacements == 5
    history.check_everything([newcomer])


def test_grace_is_asked_for_at_the_second_displacement_only() -> None:
    history = History()
    nomad = key_in(2, 5)
    history.set(nomad, 1)
    for first, second in ((2, 7), (5, 4), (7, 4), (4, 7)):  # 7 and 4 fill up: no way out but the nomad's
        for number in range(BUCKET_SLOTS if first in (4, 7) else BUCKET_SLOTS - 1):
            history.set(key_in(first, second, number), 2)
    here, there = key_in(2, 7, 9), key_in(5, 4, 9)
    history.set(here, 3)
    assert (history.displacements, history.graces) == (1, 0)
    history.remove(here)
    history.set(there, 3)
    assert (history.displacements, history.graces) == (2, 1)
    history.check_everything([nomad, here, there])


def macs(count: int, step: int) -> list[str]:
    """``count`` MACs, ``step`` apart (the first byte on the wire counts most)."""
    return [(0x02155D000000 + number * step).to_bytes(6, "big").hex(":") for number in range(count)]


def trunks(count: int, step: int) -> list[int]:
    """As many VMs on trunks of as many VLANs each: the keys of ``CAPACITY`` filters."""
    return [filter_key(mac, vid) for mac in macs(count, step) for vid in range(1, CAPACITY // count + 1)]


def random_keys() -> list[int]:
    rng = random.Random(1)
    return [rng.getrandbits(KEY_BITS) for _ in range(CAPACITY)]


@pytest.mark.parametrize(
    "keys",
    [
        *(
            pytest.param([filter_key(mac, 0) for mac in macs(CAPACITY, 1 << bits)], id=f"MACs 2^{bits} apart")
            for bits in (0, 8, 16)
        ),
        *(
            pytest.param(trunks(count, 1 << bits), id=f"{count} trunks, MACs 2^{bits} apart")
            for count in (32, 1024)
            for bits in (0, 8, 16, 24, 32)
        ),
        pytest.param(random_keys(), id="random"),
    ],
)
def test_as_many_filters_as_promised_fit(keys: list[int]) -> None:
    """And most lookups end in the first bucket: measured, 0 to 12 % of the keys are in their second."""
    words = empty_table()
    table = Classifier(words, lambda: None)
    for port, key in enumerate(keys):
        table.set(key, port)
    assert len(table) == CAPACITY
    assert all(table.get(key) == port for port, key in list(enumerate(keys))[::997])
    second = sum(word >> VALUE_BITS & 1 for word in words)
    assert second < CAPACITY * 0.15
