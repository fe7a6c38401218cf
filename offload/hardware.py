"""What a NIC offers for hardware queues, and what of it is in use: plain values, no decisions.

A *hardware queue* is one that the NIC itself sorts frames into. There are two ways to it:

rules      A rule in the NIC (MAC and VLAN) names an RX queue, which RSS then leaves alone.
functions  An SR-IOV virtual function carries the MAC and VLAN. Its device is the queue.

Either way XDP looks at every frame again: a NIC that steers wrongly costs speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

How = Literal["rules", "functions"]


@dataclass(frozen=True)
class Rule:
    """A steering rule of a NIC: frames to exactly this MAC go to ``rx_queue``.

    ``vid`` is ``None`` where the rule does not look at tags. ``location`` is the rule's place in the
    NIC's table. A rule that says anything else than this has ``mac`` empty and ``rx_queue`` -1.
    """

    location: int
    mac: str
    vid: int | None
    rx_queue: int

    @property
    def plain(self) -> bool:
        """Whether it is of the kind that we make."""
        return bool(self.mac)


@dataclass(frozen=True)
class Function:
    """A virtual function. ``mac`` and ``vid`` are what the NIC sorts into it; ``mac`` empty: nothing.

    ``device`` and ``ifindex`` are of its network device in this namespace, ``None`` without one.
    ``vid`` 0: frames without a tag. ``running``: the device is up and has its link, which a reset of the
    NIC takes away for a while. ``serves`` is the id of the port that our program there delivers to.
    ``irqs`` serve its RX queues, and so do the threads of ``napis``.
    """

    index: int
    mac: str
    vid: int
    device: str | None
    ifindex: int | None
    irqs: tuple[int, ...] = ()
    napis: tuple[int, ...] = ()
    running: bool = False
    serves: int | None = None


@dataclass(frozen=True)
class Hardware:
    """One NIC. ``how`` is ``None`` where it offers no hardware queues; ``why`` says why not.

    ``spread`` is the RSS indirection table, RX queue by slot; empty: there is none. ``total_functions`` is
    how many virtual functions the NIC can have, ``functions`` are those that exist. ``irqs`` are by RX
    queue, ``affinity`` is by interrupt that may be moved: the CPUs that may serve it, as ``0-3,6``.
    ``napis`` are ids of NAPI instances by RX queue, where a thread does their work. ``xps`` are the TX
    queues that CPUs can be told to use. ``local_cpus`` are the CPUs of the NIC's own NUMA node, empty
    where the machine has only one.
    """

    how: How | None = None
    why: str = ""
    rx_queues: int = 1
    spread: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    total_functions: int = 0
    functions: tuple[Function, ...] = ()
    irqs: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    affinity: Mapping[int, str] = field(default_factory=dict)
    napis: Mapping[int, int] = field(default_factory=dict)
    xps: tuple[int, ...] = ()
    local_cpus: tuple[int, ...] = ()
