"""Who gets a queue, and which CPU serves it. Pure: the same input gives the same answer.

The queues of this version are software queues: XDP finds the port after the NIC
chose an RX queue, and the frame goes on to the queue's own CPU through a cpumap,
or straight to the device where that is the CPU it is on already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """A port that wants a queue. ``cpu``: a number, ``nic`` (where the frame arrives) or ``auto``."""

    port: str
    weight: int
    cpu: int | Literal["auto", "nic"]


@dataclass(frozen=True)
class Queue:
    """A VM queue: its number on its NIC (1 or more) and its CPU; ``None`` is the NIC's CPU."""

    id: int
    cpu: int | None


def allocate(
    requests: Sequence[Request], held: Mapping[str, Queue], cpus: Sequence[int], limit: int | None
) -> dict[str, Queue]:
    """Queues by port; who is not in the answer waits on the default queue.

    A port keeps the queue that it holds. Free ones go to the highest weight, and among
    equals to the first in ``requests``. ``limit`` is the most queues on this NIC. ``auto`` takes the
    CPU of ``cpus`` that serves the fewest queues, the earlier in ``cpus`` among equals.
    """
    order = sorted(requests, key=lambda request: (request.port not in held, -request.weight))
    granted = order if limit is None else order[:limit]
    queues: dict[str, Queue] = {}
    load: Counter[int | None] = Counter()
    for request in granted:
        if isinstance(request.cpu, int):
            load[request.cpu] += 1
        elif request.cpu == "auto" and request.port in held:
            load[held[request.port].cpu] += 1
    for request in granted:
        had = held.get(request.port)
        given = {queue.id for queue in queues.values()}
        if had and had.id not in given:  # a port that came from another NIC may bring a number that is taken
            number = had.id
        else:
            number = _lowest_free(given | {queue.id for queue in held.values()})
        queues[request.port] = Queue(number, _cpu(request, had, cpus, load))
    return queues


def _lowest_free(taken: Collection[int]) -> int:
    return next(number for number in range(1, len(taken) + 2) if number not in taken)


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
