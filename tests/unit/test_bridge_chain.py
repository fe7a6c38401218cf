"""Extensions: order, verdicts, and what happens to one that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from offload.bridge.chain import MAX_FAILURES, Chain, load_extension
from offload.bridge.ethertypes import EtherTypes
from offload.bridge.extension import DROP, FORWARD, Extension, Frame, Verdict, redirect
from offload.bridge.membership import Configured
from offload.bridge.note import Note
from offload.errors import UsageError


def frame(ingress: str = "a", ethertype: int = 0x0800, vid: int = 0) -> Frame:
    data = memoryview(bytes(60))
    return Frame(ingress, vid, bytes(6), bytes(6), ethertype, data, memoryview(bytes(10)), 0)


class Says(Extension):
    """Says what its options have it say, and keeps what it saw."""

    asked: list[str]
    watched: list[tuple[str, ...]]

    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        self.name = options["name"]
        self.verdict = options.get("verdict", FORWARD)

    def frame(self, frame: Frame) -> Verdict:
        self.asked.append(self.name)
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        verdict: Verdict = self.verdict
        return verdict


class Watches(Extension):
    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        self.seen: list[tuple[str, ...]] = options["seen"]

    def watch(self, frame: Frame, to: Sequence[str]) -> None:
        self.seen.append((frame.ingress, *to))


class Breaks(Extension):
    """Fails wherever it is called."""

    called: list[str]

    def __init__(self, options: Mapping[str, Any], switch: str) -> None:
        self.called = options["called"]

    def watch(self, frame: Frame, to: Sequence[str]) -> None:
        self._fail("watch")

    def second(self) -> None:
        self._fail("second")

    def counters(self) -> Mapping[str, int]:
        self._fail("counters")
        return {}

    def close(self) -> None:
        self._fail("close")

    def _fail(self, where: str) -> None:
        self.called.append(where)
        raise SystemExit(where)


class Mute(Extension):
    """Defines nothing."""


CLASSES: dict[str, Any] = {"says": Says, "watches": Watches, "breaks": Breaks, "mute": Mute}


def chain_of(
    *options: dict[str, Any], off: Mapping[int, str] | None = None, note: Note | None = None
) -> Chain:
    Says.asked = []
    configured = [Configured(option.pop("kind", "says"), option) for option in options]
    return Chain(configured, "ext0", note or Note(), off or {}, CLASSES.__getitem__)


@pytest.mark.parametrize(
    ("verdicts", "expected", "asked"),
    [
        ([FORWARD, FORWARD], FORWARD, "01"),
        ([FORWARD, DROP], DROP, "01"),
        ([DROP, redirect("b")], DROP, "0"),
        ([redirect("b"), DROP], redirect("b"), "0"),
        ([RuntimeError("no"), DROP], DROP, "01"),
        ([SystemExit(0), FORWARD], FORWARD, "01"),
        ([None, DROP], DROP, "01"),
        ([Verdict("forward"), FORWARD], FORWARD, "01"),
    ],
    ids=[
        "all forward",
        "last drops",
        "first drops",
        "first redirects",
        "raises",
        "exits",
        "no verdict",
        "own forward",
    ],
)
def test_the_first_that_decides_stands(verdicts: list[Any], expected: Verdict, asked: str) -> None:
    chain = chain_of(*({"name": str(number), "verdict": verdict} for number, verdict in enumerate(verdicts)))
    assert chain.verdict(frame()) == expected
    assert "".join(Says.asked) == asked


def test_counts_what_each_did() -> None:
    chain = chain_of({"name": "x", "verdict": RuntimeError("no")}, {"name": "y", "verdict": DROP})
    for _ in range(3):
        chain.verdict(frame())
    first, second = chain.states()
    assert (first.calls, first.failures, first.drops, first.state) == (0, 3, 0, "on")
    assert (second.calls, second.failures, second.drops) == (3, 0, 3)
    chain = chain_of({"name": "x", "verdict": redirect("b")})
    chain.verdict(frame())
    (state,) = chain.states()
    assert (state.calls, state.drops, state.redirects) == (1, 0, 1)


def test_ten_failures_within_a_minute_switch_it_off() -> None:
    chain = chain_of({"name": "x", "verdict": RuntimeError("no")})
    for _ in range(MAX_FAILURES + 5):
        assert chain.verdict(frame()) is FORWARD
    (state,) = chain.states()
    assert (state.state, state.failures) == ("off", MAX_FAILURES)
    assert "RuntimeError: no" in state.reason
    assert not chain.active


def test_failures_far_apart_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("offload.bridge.chain.time.monotonic", lambda: float(next(clock)))
    chain = chain_of({"name": "x", "verdict": RuntimeError("no")})
    for _ in range(MAX_FAILURES * 3):
        chain.verdict(frame())
    assert chain.states()[0].state == "on"


def test_who_cannot_be_made_is_off_and_the_others_work() -> None:
    chain = chain_of({}, {"name": "y", "verdict": DROP})
    assert chain.verdict(frame()) is DROP
    assert [state.state for state in chain.states()] == ["off", "on"]
    assert "could not be made" in chain.states()[0].reason


def test_who_is_to_be_off_is_not_even_made() -> None:
    chain = chain_of({}, {"name": "y", "verdict": DROP}, off={0: "crashed"})
    assert chain.states()[0].reason == "crashed"
    assert chain.verdict(frame()) is DROP


def test_watchers_see_where_it_went_and_decide_nothing() -> None:
    seen: list[tuple[str, ...]] = []
    chain = chain_of({"kind": "watches", "seen": seen}, {"kind": "mute"})
    assert chain.active
    assert chain.watched
    assert chain.verdict(frame()) is FORWARD
    chain.watch(frame("a"), ["b", "c"])
    chain.watch(frame("b"), [])
    assert seen == [("a", "b", "c"), ("b",)]


def test_one_that_fails_in_every_call_takes_nobody_along() -> None:
    called: list[str] = []
    seen: list[tuple[str, ...]] = []
    chain = chain_of({"kind": "breaks", "called": called}, {"kind": "watches", "seen": seen})
    chain.watch(frame("a"), ["b"])
    chain.second()
    assert [state.counters for state in chain.states()] == [{}, {}]
    state = chain.states()[0]
    assert (state.state, state.failures, state.reason) == ("on", 3, "SystemExit: counters")
    chain.close()
    assert called == ["watch", "second", "counters", "counters", "close"]
    assert seen == [("a", "b")]


def test_who_defines_nothing_costs_nothing() -> None:
    assert not chain_of({"kind": "mute"}).active


def test_the_note_names_who_is_in_a_call() -> None:
    note = Note()
    inside: list[int | None] = []

    class Looks(Extension):
        def __init__(self, options: Mapping[str, Any], switch: str) -> None:
            inside.append(note.running)

        def frame(self, frame: Frame) -> Verdict:
            inside.append(note.running)
            return FORWARD

    chain = Chain(
        [Configured("mute"), Configured("looks")], "ext0", note, {}, {**CLASSES, "looks": Looks}.__getitem__
    )
    before = note.progress
    chain.verdict(frame())
    assert inside == [1, 1]
    assert note.running is None
    assert note.progress != before


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no extension nosuch: .*there is: .*mirror"):
        load_extension("nosuch")


def test_the_example_drops_what_is_not_allowed() -> None:
    example = EtherTypes({"allow": [0x0800], "members": ["a"]}, "ext0")
    assert example.frame(frame("a", 0x0800)) is FORWARD
    assert example.frame(frame("a", 0x88CC)) is DROP
    assert example.frame(frame("b", 0x88CC)) is FORWARD
    assert example.counters() == {"0x88cc": 1}
    with pytest.raises(ValueError, match="allow"):
        EtherTypes({"alow": []}, "ext0")
