"""When a queue moves to another CPU, and which one. Pure: samples in, at most one move out.

A CPU that stays busy gives one of its queues to a CPU where that makes the higher of the two loads clearly
lower. What is predicted is simple: a queue takes with it what it took. That is wrong by little or by much
(caches, frames that were lost for want of time), which is why there are pauses, and new samples before
the next move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

BUSY = 0.70
"""Share of its time from which a CPU is too busy: above it, frames begin to wait noticeably in bursts."""
STREAK = 3
"""Samples in a row that must say so. One second can be anything: a backup, a compiler."""
GAIN = 0.10
"""By how much a move must lower the higher of two loads. A sample is exact to one or two points."""
NIC_PAUSE = 5.0
"""Seconds between two moves on a NIC, so that a decision rests on samples from after the last move."""
QUEUE_PAUSE = 30.0
"""Seconds for which a queue that has moved stays: a load that swings shall not drag it along."""
FRESH = 3.0
"""Seconds that a sample may be old or long; samples are taken each second."""
TELL_PAUSE = 60.0
"""Seconds between two messages that nothing can move."""


@dataclass(frozen=True)
class Load:
    """What a queue took. ``cpu`` serves it, ``None``: the NIC's. ``share`` is of that CPU's time, 0 to 1.

    ``packets`` and ``bytes`` are what it delivered, a second.
    """

    cpu: int | None
    share: float
    packets: float
    bytes: float


@dataclass(frozen=True)
class Sample:
    """What was so from ``began`` to ``ended``, in seconds of the monotonic clock.

    ``busy`` is the share of its time, 0 to 1, that each online CPU was at work for whatever it was.
    ``queues`` are those of one NIC, by port. ``program`` is how much of a CPU the program on the
    NIC took, over all CPUs; ``None`` where the kernel does not count it.
    """

    began: float
    ended: float
    busy: Mapping[int, float]
    queues: Mapping[str, Load]
    program: float | None = None


@dataclass(frozen=True)
class Move:
    """``port``'s queue goes from CPU ``source``, which is ``before`` busy, to ``target``.

    ``after`` is how busy that one will be, as predicted. ``load`` is the queue's.
    """

    port: str
    source: int
    target: int
    before: float
    after: float
    load: Load

    @property
    def why(self) -> str:
        """For people: how busy the queue's CPU was, and how busy the one where it is then will be."""
        return (
            f"{100 * self.before:.0f} % -> {100 * self.after:.0f} % "
            f"(it took {100 * self.load.share:.0f} % for {self.load.packets:,.0f} frames/s, "
            f"{self.load.bytes * 8e-6:,.0f} Mbit/s)"
        )


@dataclass(frozen=True)
class Stuck:
    """CPU ``cpu`` is too busy, ``load`` of its time, and no queue can leave it."""

    cpu: int
    load: float
    why: str

    def __str__(self) -> str:
        return f"CPU {self.cpu} is {100 * self.load:.0f} % busy and no queue can leave it: {self.why}"


def decide(
    history: Sequence[Sample],
    cpus: Collection[int],
    pinned: Collection[str],
    moved: Mapping[str, float],
    now: float,
) -> Move | Stuck | None:
    """The next move on a NIC, or why there is none although there should be.

    ``history`` has the latest sample last. ``cpus`` are those that queues of this NIC may use; those
    without a load in every sample that counts are offline. Ports that are ``pinned`` stay. ``moved``
    tells when queues of this NIC were moved, by port, ``now`` what time it is, on the samples' clock.
    """
    recent = history[-STREAK:]
    if not _in_a_row(recent, now) or any(now - at < NIC_PAUSE for at in moved.values()):
        return None
    busy = {
        cpu: fmean(sample.busy[cpu] for sample in recent)
        for cpu in recent[-1].busy
        if all(cpu in sample.busy for sample in recent)
    }
    queues = {port: load for port in recent[-1].queues if (load := _steady(port, recent))}
    hot = [
        cpu
        for cpu in {load.cpu for load in queues.values()}
        if cpu in busy and all(sample.busy[cpu] > BUSY for sample in recent)
    ]
    hot.sort(key=lambda cpu: -busy[cpu])
    resting = {port for port, at in moved.items() if now - at < QUEUE_PAUSE}
    targets = [cpu for cpu in cpus if cpu in busy]
    stuck = None
    for cpu in hot:
        movable = {port: load for port, load in queues.items() if load.cpu == cpu and port not in pinned}
        moves = list(_moves(cpu, movable, targets, busy))
        if possible := [move for move in moves if move.port not in resting]:
            return min(possible, key=_highest)
        if not moves and stuck is None:
            stuck = Stuck(cpu, busy[cpu], _why_not(cpu, movable, targets))
    return stuck


def _in_a_row(recent: Sequence[Sample], now: float) -> bool:
    """Whether there are samples enough, each begun where the one before it ended, and all of them fresh."""
    return (
        len(recent) == STREAK
        and all(earlier.ended == later.began for earlier, later in pairwise(recent))
        and all(sample.ended - sample.began <= FRESH for sample in recent)
        and now - recent[-1].ended <= FRESH
    )


def _steady(port: str, recent: Sequence[Sample]) -> Load | None:
    """The mean of a queue's samples, if it was on one CPU in all of them."""
    loads = [sample.queues[port] for sample in recent if port in sample.queues]
    if len(loads) < len(recent) or len({load.cpu for load in loads}) > 1:
        return None
    return Load(
        cpu=loads[0].cpu,
        share=fmean(load.share for load in loads),
        packets=fmean(load.packets for load in loads),
        bytes=fmean(load.bytes for load in loads),
    )


def _moves(
    source: int, movable: Mapping[str, Load], targets: Collection[int], busy: Mapping[int, float]
) -> Iterator[Move]:
    """Every move from ``source`` that is worth it."""
    for port, load in movable.items():
        for target in targets:
            move = Move(port, source, target, busy[source], busy[target] + load.share, load)
            if target != source and _highest(move) <= busy[source] - GAIN:
                yield move


def _highest(move: Move) -> float:
    """The higher load of the two CPUs after a move."""
    return max(move.before - move.load.share, move.after)


def _why_not(source: int, movable: Mapping[str, Load], targets: Collection[int]) -> str:
    if not movable:
        return "all of its queues are pinned"
    if not set(targets) - {source}:
        return "queues.cpus has no other CPU that is online"
    heaviest = max(movable, key=lambda port: movable[port].share)
    return (
        f"no move would lower the higher of two loads by {100 * GAIN:.0f} points; the queue that takes most, "
        f"{heaviest}, takes {100 * movable[heaviest].share:.0f} %"
    )


class Balance:
    """One NIC's latest samples and moves."""

    def __init__(self) -> None:
        self._history: deque[Sample] = deque(maxlen=STREAK)
        self._moved: dict[str, float] = {}
        self._told: float | None = None

    def judge(self, sample: Sample, cpus: Collection[int], pinned: Collection[str]) -> Move | Stuck | None:
        """``decide`` with one sample more. A move counts as made; the same trouble is told once a minute."""
        now = sample.ended
        self._history.append(sample)
        decision = decide(tuple(self._history), cpus, pinned, self._moved, now)
        match decision:
            case Move(port=port):
                recent = {port: at for port, at in self._moved.items() if now - at < QUEUE_PAUSE}
                self._moved = {**recent, port: now}
            case Stuck():
                if self._told is not None and now - self._told < TELL_PAUSE:
                    return None
                self._told = now
        return decision
