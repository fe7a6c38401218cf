"""Who gets which queue, and which CPU serves it. Pure: the same input gives the same answer.

A *software queue* is one that XDP sorts frames into, after the NIC chose an RX queue: the frame goes
on to the queue's own CPU through a cpumap, or straight to the device where that is the CPU it is on
already. A *hardware queue* is one that the NIC itself sorts frames into: see ``hardware.py``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """A port that wants a queue. ``cpu``: a number, ``nic`` (where the frame arrives) or ``auto``.

    ``kind`` ``auto`` takes a hardware queue, or a software one where there is none for it.
    """

    port: str
    weight: int
    cpu: int | Literal["auto", "nic"]
    kind: Literal["auto", "hardware", "software"] = "software"


@dataclass(frozen=True)
class Queue:
    """A VM queue: its number on its NIC (1 or more) and its CPU; ``None`` is the NIC's CPU.

    ``slot`` is ``None`` for a software queue. For a hardware queue it is what the NIC sorts frames into:
    an RX queue, or a virtual function by its index.
    """

    id: int
    cpu: int | None
    slot: int | None = None

    @property
    def kind(self) -> Literal["hardware", "software"]:
        return "software" if self.slot is None else "hardware"


def allocate(
    requests: Sequence[Request],
    held: Mapping[str, Queue],
    cpus: Sequence[int],
    limit: int | None,
    slots: Sequence[int] = (),
    beside: Mapping[str, Queue] | None = None,
) -> dict[str, Queue]:
    """Queues by port; who is not in the answer waits on the default queue.

    A port keeps the queue that it holds. Free ones go to the highest weight, and among
    equals to the first in ``requests``, the oldest. ``limit`` is the most queues on this NIC. ``auto``
    takes the CPU of ``cpus`` that serves the fewest queues, the earlier in ``cpus`` among equals.
    ``slots`` are the NIC's hardware queues, those to be used first at the front. One that is left over
    goes to the software queue with the highest weight that may be a hardware one. ``beside`` are queues of
    ports that do not ask now, and keep them: for software queues without a limit.
    """
    granted = _granted(requests, held, limit, slots)
    queues: dict[str, Queue] = {}
    standing = (beside or {}).values()
    brought = {queue.id for queue in (*held.values(), *standing)}
    given: set[int] = set()
    free = (number for number in itertools.count(1) if number not in brought and number not in given)
    load: Counter[int | None] = Counter(queue.cpu for queue in standing)
    for request, _ in granted:
        if isinstance(request.cpu, int):
            load[request.cpu] += 1
        elif request.cpu == "auto" and request.port in held:
            load[held[request.port].cpu] += 1
    for request, slot in granted:
        had = held.get(request.port)
        # A port that came from another NIC may bring a number that is taken.
        number = had.id if had and had.id not in given else next(free)
        given.add(number)
        queues[request.port] = Queue(number, _cpu(request, had, cpus, load), slot)
    return queues


def _granted(
    requests: Sequence[Request], held: Mapping[str, Queue], limit: int | None, slots: Sequence[int]
) -> list[tuple[Request, int | None]]:
    """Who has a queue, and which slot: those who hold one first, then by weight and age."""
    order = sorted(requests, key=lambda request: (request.port not in held, -request.weight))
    kept: dict[str, int] = {}
    for request in order:
        slot = held[request.port].slot if request.port in held else None
        usable = slot in slots and slot not in kept.values() and request.kind != "software"
        if slot is not None and usable:
            kept[request.port] = slot
    free = [slot for slot in slots if slot not in kept.values()]
    granted: dict[str, tuple[Request, int | None]] = {}
    for request in order:
        if limit is not None and len(granted) == limit:
            break
        slot = kept.get(request.port)
        waits = request.port not in held or request.kind == "hardware"
        if slot is None and waits and request.kind != "software" and free:
            slot = free.pop(0)
        if slot is not None or request.kind != "hardware":
            granted[request.port] = (request, slot)
    for request, slot in sorted(granted.values(), key=lambda grant: -grant[0].weight):
        if free and slot is None and request.kind == "auto":
            granted[request.port] = (request, free.pop(0))
    return list(granted.values())


def _cpu(request: Request, had: Queue | None, cpus: Sequence[int], load: Counter[int | None]) -> int | None:
    if request.cpu == "nic":
        return None
    if isinstance(request.cpu, int):
        return request.cpu
    if had and had.cpu in cpus:
        return had.cpu
    chosen = min(cpus, key=lambda cpu: load[cpu])
    load[chosen] += 1
    return chosen
