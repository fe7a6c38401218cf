"""Which hardware queues a NIC has for VMs, and what makes it sort their frames there. Pure.

See ``hardware.py`` for the two ways. In either, everything that a frame meets on its new way stands before
the NIC is told to sort, and the NIC is told to stop before any of it goes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .config import PortConfig, QueuesConfig
from .hardware import Function, Hardware, Rule
from .model import (
    AdminUp,
    Feature,
    FunctionAddress,
    FunctionPort,
    Functions,
    Ipv6Disabled,
    IrqAffinity,
    Link,
    Member,
    MemberRow,
    NapiAffinity,
    NicAddress,
    Resource,
    Spread,
    SteeringRule,
    Value,
    Xps,
)
from .queues import Queue

STEERING_FEATURE = "rx-ntuple-filter"


@dataclass(frozen=True)
class Nic:
    """A NIC that is the uplink of a switch.

    ``own`` are MAC and VID of the rules that are ours. ``member`` is the row of a virtual function that
    serves no port, ``digests`` those of the programs in XDP and in tc. ``generic``: XDP is in that mode.
    """

    link: Link
    hardware: Hardware
    settings: QueuesConfig
    own: frozenset[tuple[str, int]]
    member: MemberRow
    digests: tuple[str, str]
    generic: bool = False

    @property
    def at(self) -> tuple[str, int]:
        return (self.link.name, self.link.ifindex)

    def is_own(self, rule: Rule) -> bool:
        return (rule.mac, rule.vid or 0) in self.own

    def function(self, index: int) -> Function | None:
        return next((one for one in self.hardware.functions if one.index == index), None)


@dataclass(frozen=True)
class Steered:
    """A port with a hardware queue. ``here`` are its addresses that are at its device now."""

    port_id: int
    port: PortConfig
    queue: Queue
    here: Sequence[str]


def usable(nic: Hardware, *, python: bool, generic: bool) -> Hardware:
    """What a NIC offers to a switch, which may have a Python bridge, in generic XDP mode or not.

    A Python bridge was never tried beside virtual functions. In generic mode the NIC's program would not see
    the tag of what a function gives to it, which is beside the frame.
    """
    if nic.how == "functions" and generic:
        return Hardware(why="its virtual functions are of use with `xdp_mode: native` only")
    if nic.how == "functions" and python:
        return Hardware(why="its virtual functions are of use with `bridge: kernel` only")
    return nic


def slots(nic: Nic) -> tuple[int, ...]:
    """The hardware queues for VMs, those to be used first at the front. The default queue keeps RX queue 0.

    RX queues that somebody else's rules name are theirs.
    """
    match nic.hardware.how:
        case "rules":
            theirs = {rule.rx_queue for rule in nic.hardware.rules if not nic.is_own(rule)}
            return tuple(queue for queue in range(nic.hardware.rx_queues - 1, 0, -1) if queue not in theirs)
        case "functions":
            return tuple(range(number_of_functions(nic)))
        case None:
            return ()


def number_of_functions(nic: Nic) -> int:
    """How many virtual functions a NIC has while it is ours. That cannot be changed while there are any."""
    most = nic.hardware.total_functions
    return len(nic.hardware.functions) or min(nic.settings.vfs or most, most)


def unfit(nic: Nic, port: PortConfig) -> str | None:
    """Why none of a NIC's hardware queues can be this port's."""
    hardware = nic.hardware
    if hardware.how is None:
        return hardware.why
    if hardware.how == "rules":
        for rule in hardware.rules:
            if rule.mac in port.mac and not nic.is_own(rule):
                return (
                    f"a rule that is not ours steers {rule.mac} to RX queue {rule.rx_queue}: "
                    f"`ethtool -N {nic.link.name} delete {rule.location}`"
                )
        return None
    if port.vlan.trunk:
        return "a virtual function carries one VLAN, and this port is a trunk"
    if len(port.mac) > 1:
        return "a virtual function carries one MAC, and this port has several"
    if port.af_xdp and port.af_xdp.mode == "hardware":
        return "its sockets are on the NIC's own RX queues, which get nothing of a virtual function's"
    return None


def standing(nic: Nic, port: PortConfig, queue: Queue) -> bool:
    """Whether a port's frames are sorted into its hardware queue now, as read back."""
    if nic.hardware.how == "functions":
        vid = port.vlan.native or 0
        return any(
            one.index == queue.slot and one.mac in port.mac and one.vid == vid and one.running
            for one in nic.hardware.functions
        )
    return any(
        rule.rx_queue == queue.slot and rule.mac in port.mac and nic.is_own(rule)
        for rule in nic.hardware.rules
    )


def held_slot(nic: Nic, port: PortConfig, port_id: int) -> int | None:
    """The hardware queue that a port has, also while nothing is sorted into it."""
    if nic.hardware.how == "functions":
        return next((one.index for one in nic.hardware.functions if one.serves == port_id), None)
    return rx_queue(nic, port)


def rx_queue(nic: Nic, port: PortConfig) -> int | None:
    """The RX queue that a rule of ours gives a port's frames to, as read back; ``None`` without one."""
    rules = (rule for rule in nic.hardware.rules if rule.mac in port.mac and nic.is_own(rule))
    return next((rule.rx_queue for rule in rules), None)


def device(nic: Nic, queue: Queue | None) -> str | None:
    """The virtual function's device that is a hardware queue; ``None`` where it is none or not there yet."""
    if nic.hardware.how != "functions" or queue is None or queue.slot is None:
        return None
    found = nic.function(queue.slot)
    return found.device if found else None


def steered(nic: Nic, ports: Sequence[Steered], macs: Iterable[str]) -> dict[Resource, Value]:
    """What makes the NIC sort the frames of ``ports``, and puts each queue's interrupts on its CPU.

    ``macs`` are the addresses of all ports of the NIC.
    """
    match nic.hardware.how:
        case "rules":
            return dict(_by_rules(nic, ports))
        case "functions":
            return dict(_by_functions(nic, ports, macs))
        case None:
            return {}


def _by_rules(nic: Nic, ports: Sequence[Steered]) -> Iterator[tuple[Resource, Value]]:
    hardware = nic.hardware
    shared = _shared_macs(ports)
    used = set()
    for one in ports:
        slot = one.queue.slot
        assert slot is not None, "only ports with a hardware queue are steered"
        used.add(slot)
        napis = [hardware.napis[slot]] if slot in hardware.napis else []
        yield from _placed(nic, *nic.at, hardware.irqs.get(slot, ()), napis, one.queue.cpu)
        if slot in hardware.xps and one.queue.cpu is not None:
            yield Xps(*nic.at, slot), str(one.queue.cpu)
        for mac in one.here:
            # XDP looks at the tag: one rule does for a trunk, unless another port has the same MAC.
            for vid in one.port.vlan.vids if mac in shared else (0,):
                yield SteeringRule(*nic.at, mac, vid), slot
    if used:
        yield Feature(*nic.at, STEERING_FEATURE), True
        if hardware.spread:
            yield Spread(*nic.at), spread_without(used, hardware.rx_queues, len(hardware.spread))


def spread_without(queues: Collection[int], rx_queues: int, slots: int) -> tuple[int, ...]:
    """An RSS indirection table with ``slots`` entries that leaves ``queues`` out, and the rest even."""
    left = [queue for queue in range(rx_queues) if queue not in queues] or [0]
    return tuple(left[slot % len(left)] for slot in range(slots))


def _shared_macs(ports: Iterable[Steered]) -> frozenset[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for one in ports:
        twice |= seen & {*one.port.mac}
        seen |= {*one.port.mac}
    return frozenset(twice)


def _by_functions(
    nic: Nic, ports: Sequence[Steered], macs: Iterable[str]
) -> Iterator[tuple[Resource, Value]]:
    """All virtual functions have their programs and are up, whoever uses them: to start one takes long.

    The NIC is told of every address that no function has: what is nobody's to a promiscuous 82576 with
    functions, these may get it instead.
    """
    mode = nic.settings.vf_xdp_mode
    yield Functions(*nic.at), number_of_functions(nic)
    users = {one.queue.slot: one for one in ports}
    sorted_out: set[str] = set()
    for function in nic.hardware.functions:
        if function.device is None or function.ifindex is None:
            continue  # still to come: the next look will find it
        at = (function.device, function.ifindex)
        user = users.get(function.index)
        vid = (user.port.vlan.native or 0) if user else 0
        yield Ipv6Disabled(*at), True
        yield AdminUp(*at), True
        yield Member(*at), replace(nic.member, pvid=vid).as_value(nic.digests[1])
        yield FunctionPort(*at), (nic.link.name, user.port_id if user else None, vid, mode, nic.digests[0])
        if user:
            yield from _placed(nic, *at, function.irqs, function.napis, user.queue.cpu)
            for mac in user.here if function.running else ():
                sorted_out.add(mac)
                yield FunctionAddress(*nic.at, function.index), (mac, vid)
    for mac in macs:
        if mac not in sorted_out:
            yield NicAddress(*nic.at, mac), True


def _placed(
    nic: Nic, device: str, ifindex: int, irqs: Iterable[int], napis: Iterable[int], cpu: int | None
) -> Iterator[tuple[Resource, Value]]:
    """The work of a queue is on its CPU: interrupts, and NAPI threads where there are any."""
    if cpu is None:
        return
    for irq in irqs:
        if irq in nic.hardware.affinity:
            yield IrqAffinity(device, ifindex, irq), str(cpu)
    for napi in napis:
        yield NapiAffinity(device, ifindex, napi), str(cpu)


def own_rules(journalled: Mapping[Resource, Value], ifindex: int) -> frozenset[tuple[str, int]]:
    """MAC and VID of the rules on a NIC that we made: those on record as not having been there."""
    return frozenset(
        (resource.mac, resource.vid)
        for resource, before in journalled.items()
        if isinstance(resource, SteeringRule) and resource.ifindex == ifindex and before is None
    )
