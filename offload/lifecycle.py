"""The life of a VM queue: its states, and what happened. Pure.

    undefined -> allocated -> set -> running <-> paused -> freed -> undefined

undefined  There is no such queue.
allocated  It has its number and its CPU, and no filter: its device is away, or was not heard yet.
set        Its filters stand, and nothing goes through it: its CPU is offline, or the NIC of a hardware
           queue has not been read back to sort frames there.
running    Frames go through it.
paused     Its port's device, or the other end of that, is down.
freed      Its port has gone, or has no queue any more. Only a moment: from then on it is undefined.

A queue is looked at when a reconciliation has ended. What it was in between is nobody's to tell, so
that an event goes from what was seen last to what is seen now, whatever states lie between these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from .model import Filter
from .plan import Desired, PortDecision
from .views import QueueEvent, QueueKind, QueueState

KEPT = 1_000
"""Events that are kept to be shown."""

FOUND = "as it was found when the daemon started"

Key = tuple[str, int]
"""A queue: its NIC, and its number there."""


@dataclass(frozen=True)
class Standing:
    """A queue as it is seen at one moment. ``cpu`` ``None`` is the NIC's CPU.

    ``reason`` is why it is not more, as the port has it.
    """

    port: str
    kind: QueueKind
    state: QueueState
    cpu: int | None
    reason: str | None = field(default=None, compare=False)


def state_of(decision: PortDecision, *, filters: bool) -> QueueState:
    """The state of a port's queue. ``filters``: its NIC's table has at least one that leads there."""
    queue = decision.queue
    if queue is None:
        return "undefined"
    if decision.state == "paused":
        return "paused"
    if not filters:
        return "allocated"
    sorted_there = queue.slot is None or decision.queue_standing
    return "running" if decision.path != "bridge" and sorted_there else "set"


def standings(desired: Desired, ports: Collection[str] | None = None) -> dict[Key, Standing]:
    """The VM queues of ``ports``, ``None``: of all; the default queues are not among them."""
    names = desired.ports if ports is None else ports & desired.ports.keys()
    return {
        (decision.nic, decision.queue.id): Standing(
            port=decision.name,
            kind=decision.queue.kind,
            state=state_of(
                decision, filters=any(isinstance(resource, Filter) for resource in desired.shares[name])
            ),
            cpu=decision.queue.cpu,
            reason=decision.reason,
        )
        for name in names
        if (decision := desired.ports[name]).nic and decision.queue
    }


class Life:
    """Follows the queues, and keeps the last ``KEPT`` events.

    ``since`` is when each queue came into its state, as far as it was seen.
    """

    def __init__(self) -> None:
        self.since: dict[Key, datetime] = {}
        self._seen: dict[Key, Standing] | None = None
        self._events: deque[QueueEvent] = deque(maxlen=KEPT)

    @property
    def events(self) -> list[QueueEvent]:
        """The oldest first."""
        return list(self._events)

    def follow(
        self,
        now: Mapping[Key, Standing],
        time: datetime,
        why: Mapping[str, str] | None = None,
        ports: Collection[str] | None = None,
    ) -> tuple[QueueEvent, ...]:
        """What happened since the last call: queues that were freed first, then by NIC and number.

        ``now`` has the queues of ``ports``, ``None``: of all; queues of other ports are as they were.
        ``why`` has reasons by port; without one there, a queue that does not run has that of its
        ``Standing``. The first call tells each queue once, from undefined to what it is: nobody has
        seen it become so.
        """
        known = self._seen or {}
        seen = known if ports is None else {key: one for key, one in known.items() if one.port in ports}
        why = {one.port: FOUND for one in now.values()} if self._seen is None else why or {}
        events = [
            *(
                _event(time, key, before, None, why.get(before.port))
                for key, before in sorted(seen.items())
                if key not in now or now[key].port != before.port
            ),
            *(
                _event(time, key, before, after, why.get(after.port))
                for key, before, after in _kept(seen, now)
                if before != after
            ),
        ]
        fresh = {
            key: self.since.get(key, time) if before and before.state == after.state else time
            for key, before, after in _kept(seen, now)
        }
        since, known = self.since.copy(), known.copy()  # another thread may be reading the former
        for key in seen:
            del since[key], known[key]
        self.since, self._seen = since | fresh, {**known, **now}
        self._events.extend(events)
        return tuple(events)


def _kept(
    seen: Mapping[Key, Standing], now: Mapping[Key, Standing]
) -> Iterator[tuple[Key, Standing | None, Standing]]:
    """The queues of now beside what they were, ``None`` where they were not, or another port's."""
    for key, after in sorted(now.items()):
        before = seen.get(key)
        yield key, before if before and before.port == after.port else None, after


def _event(
    time: datetime, key: Key, before: Standing | None, after: Standing | None, why: str | None
) -> QueueEvent:
    known = after or before
    assert known, "an event has a before or an after"
    if why is None and after and after.state != "running":
        why = after.reason
    text = _text(key, before, after)
    return QueueEvent(
        time=time,
        nic=key[0],
        queue=key[1],
        kind=known.kind,
        port=known.port,
        before=before.state if before else "undefined",
        after=after.state if after else "freed",
        cpu_before=before.cpu if before else None,
        cpu=after.cpu if after else None,
        why=why,
        text=f"{text}: {why}" if why else text,
    )


def _text(key: Key, before: Standing | None, after: Standing | None) -> str:
    nic, number = key
    if before is None:
        assert after
        return f"{after.port}: {after.kind} queue {number} of {nic} is {after.state}, on {_cpu(after.cpu)}"
    queue = f"{before.port}: queue {number} of {nic}"
    if after is None:
        return f"{queue} is freed, was {before.state}"
    told = []
    if after.state != before.state:
        told.append(f"{queue} is {after.state}, was {before.state}")
    if after.kind != before.kind:
        told.append(f"{queue} is a {after.kind} queue now, was a {before.kind} one")
    if after.cpu != before.cpu:
        # "from CPU 2 to 3" where both are numbers
        to = _cpu(after.cpu) if before.cpu is None or after.cpu is None else after.cpu
        told.append(f"moved {after.port} from {_cpu(before.cpu)} to {to}")
    return "; ".join(told)


def _cpu(cpu: int | None) -> str:
    return "the NIC's CPU" if cpu is None else f"CPU {cpu}"
