"""Contestants against each other: A B A B, there and back, round after round, in one run.

::

    Comparison
      contestants   a name, and how it is set up; what that gives runs one round of a load
      loads         what they have to carry
      bases         whom the others are measured against

Everybody is set up before the first round and left alone after it. A round gives figures; ratios are taken
within the round, and the medians of figures and ratios are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tests.bench.figures import Spread, ratio, spread

LEAST_ROUNDS = 3


class Unavailable(Exception):
    """A contestant cannot take part, here or under this load. The message says why."""


class Load(Protocol):
    """What is to be carried."""

    @property
    def name(self) -> str: ...


L = TypeVar("L", bound=Load)
L_contra = TypeVar("L_contra", bound=Load, contravariant=True)


@dataclass(frozen=True)
class Figure:
    """How a figure of a round is shown: its value times ``scale``, in ``unit``."""

    key: str
    label: str
    unit: str
    scale: float = 1.0
    less_is_better: bool = False


FRAMES = Figure("frames_per_s", "frames", "Mpps", 1e-6)
BITS = Figure("bits_per_s", "rate", "Gbit/s", 1e-9)
CPU_FRAME = Figure("cpu_ns_per_frame", "CPU", "ns/frame", less_is_better=True)
CPU_BYTES = Figure("cpu_ns_per_kib", "CPU", "ns/KiB", less_is_better=True)


@dataclass(frozen=True)
class Round:
    """What one round gave.

    ``frames`` and ``octets`` arrived, of ``sent`` frames; 0 where nobody counts them. ``seconds`` is what
    the sender took, ``cpu_seconds`` is of all CPUs. ``further`` are figures of other kinds, by key.
    """

    seconds: float
    cpu_seconds: float = 0.0
    frames: int = 0
    octets: int = 0
    sent: int = 0
    further: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """All figures by key; what was not counted has none."""
        found = dict(self.further)
        if self.sent:
            found[FRAMES.key] = self.frames / self.seconds
        if self.sent and self.cpu_seconds:
            found[CPU_FRAME.key] = self.cpu_seconds * 1e9 / max(self.frames, 1)
        if self.octets:
            found[BITS.key] = self.octets * 8 / self.seconds
        if self.octets and self.cpu_seconds:
            found[CPU_BYTES.key] = self.cpu_seconds * 1e9 / (self.octets / 1024)
        return found


class Runner(Protocol[L_contra]):
    """A contestant that was set up. Raises ``Unavailable`` for a load that it cannot carry at all."""

    def __call__(self, load: L_contra, /) -> Round: ...


@dataclass(frozen=True)
class Contestant(Generic[L]):
    """``set_up`` leaves on the stack what takes it down, and returns what runs a round.

    It raises ``Unavailable`` where the contestant cannot be had.
    """

    name: str
    set_up: Callable[[ExitStack], Runner[L]]


@dataclass(frozen=True)
class Comparison(Generic[L]):
    """Who is compared, under which loads. ``bases`` are names of contestants by what they are called.

    ``figures`` are those to show; the first is the one that counts. ``budget`` is in seconds and bounds
    the rounds, ``most`` is how many there are at most.
    """

    name: str
    title: str
    contestants: Sequence[Contestant[L]]
    loads: Sequence[L]
    figures: Sequence[Figure]
    bases: Mapping[str, str]
    budget: float
    most: int = 51


@dataclass(frozen=True)
class Score:
    """A contestant's figures under a load, by key, and their ratios: by base, then by key.

    ``lost`` is of the ``sent`` frames of all rounds.
    """

    name: str
    figures: Mapping[str, Spread]
    ratios: Mapping[str, Mapping[str, float]]
    sent: int
    lost: int


@dataclass(frozen=True)
class Outcome:
    """One load's scores. ``missing`` are the contestants that took no part, with the reason."""

    comparison: str
    title: str
    load: str
    rounds: int
    figures: Sequence[Figure]
    scores: Sequence[Score]
    missing: Mapping[str, str]

    def score(self, name: str) -> Score | None:
        return next((score for score in self.scores if score.name == name), None)


def contend(comparison: Comparison[L]) -> list[Outcome]:
    """Run a comparison: an outcome for each load."""
    with ExitStack() as held:
        missing: dict[str, str] = {}
        runners: dict[str, Runner[L]] = {}
        for contestant in comparison.contestants:
            try:
                runners[contestant.name] = contestant.set_up(held)
            except Unavailable as error:
                missing[contestant.name] = str(error)
        fields = [_Field(load, runners, missing) for load in comparison.loads]
        end = time.monotonic() + comparison.budget
        rounds = 0
        while rounds < comparison.most and (rounds < LEAST_ROUNDS or time.monotonic() < end):
            for each in fields:
                each.play()
            rounds += 1
        return [each.outcome(comparison) for each in fields]


class _Field(Generic[L]):
    """Those who carry one load, each with what it gave so far."""

    def __init__(self, load: L, runners: Mapping[str, Runner[L]], missing: Mapping[str, str]) -> None:
        self._load = load
        self._missing = dict(missing)
        self._turns: list[tuple[Runner[L], list[Round]]] = []
        self._rounds: dict[str, list[Round]] = {}
        for name, runner in runners.items():
            try:
                runner(load)  # what comes first pays for what is made on demand, and does not count
            except Unavailable as error:
                self._missing[name] = str(error)
            else:
                self._rounds[name] = []
                self._turns.append((runner, self._rounds[name]))

    def play(self) -> None:
        """One round, in the other order than the one before."""
        for runner, rounds in self._turns:
            rounds.append(runner(self._load))
        self._turns.reverse()

    def outcome(self, comparison: Comparison[L]) -> Outcome:
        figures = {name: _columns(rounds) for name, rounds in self._rounds.items()}
        bases = {called: figures[name] for called, name in comparison.bases.items() if name in figures}
        scores = [
            Score(
                name=name,
                figures={key: spread(values) for key, values in figures[name].items()},
                ratios={
                    called: {
                        key: found
                        for key, values in figures[name].items()
                        if key in base and (found := ratio(values, base[key])) is not None
                    }
                    for called, base in bases.items()
                },
                sent=sum(each.sent for each in rounds),
                lost=sum(each.sent - each.frames for each in rounds),
            )
            for name, rounds in self._rounds.items()
        ]
        count = max(map(len, self._rounds.values()), default=0)
        return Outcome(
            comparison.name,
            comparison.title,
            self._load.name,
            count,
            comparison.figures,
            scores,
            self._missing,
        )


def _columns(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """The figures that every round had, by key."""
    rows = [each.figures() for each in rounds]
    return {key: [row[key] for row in rows] for key in rows[0] if all(key in row for row in rows)}
