"""From a config and the facts to what the kernel shall be, and from there to the steps. Pure.

``desire`` decides everything that is decided about a port or a NIC; ``difference`` knows
nothing of either, only in which order things may be set and unset. Nothing
here reads or writes anything, so every case is a table in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .config import Config, NicConfig, PortConfig, cpus_named
from .errors import ConfigError, ForeignError, OffloadError, Problem, UnsupportedError
from .model import (
    AdminUp,
    Bridge,
    BridgePort,
    Change,
    Fdb,
    Feature,
    Filter,
    Guard,
    Ipv6Disabled,
    Link,
    Master,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    QueueCpu,
    Resource,
    State,
    Uplink,
    Value,
)
from .queues import Queue, Request, allocate

RUNNING, TRUNK, NO_FRAGS, FRAGS_POSSIBLE = 1, 2, 4, 8
"""Port flags, as in ``bpf/abi.h``."""

RING_SIZE = 4096
"""Frames that may wait for a queue's CPU. The kernel takes up to 16,384."""

ETHERNET_HEADER = 14
ONE_BUFFER = 3_000
"""Bytes that every driver with XDP fits into one buffer: a page less headroom and the kernel's own part."""

TAG_IN_FRAME = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")
"""Features of a NIC that hide the VLAN tag from XDP."""
PEER_TAG_IN_FRAME = ("tx-vlan-hw-insert", "tx-vlan-stag-hw-insert")
"""The same on a veth: it is the sender's end that keeps the tag beside the frame."""
NAPI = "rx-gro"
"""A veth takes redirected frames only while its other end polls, which GRO switches on."""

_REDIRECT_TARGETS = ("veth", "tun")
_RECYCLED = re.compile(r"vnet\d+")


@dataclass(frozen=True)
class Facts:
    """What was read of this host before deciding. Devices are named, not numbered, unless said otherwise.

    ``peers`` tells for every veth that matters why its other end cannot be reached (``None``: it
    can). ``features`` has the active tag features of the uplinks, ``True`` where they can
    be switched off. ``held`` is the port table: id, queue and flags by port name.
    ``redirects_frags``: XDP can hand a frame of several buffers to a device that takes such frames.
    """

    links: Mapping[str, Link]
    online_cpus: tuple[int, ...]
    vlan_filtering: bool = False
    redirects_frags: bool = True
    digest: str = ""
    guard_digest: str = ""
    detached: bool = False
    bridges: frozenset[str] = frozenset()
    programs: Mapping[int, int] = field(default_factory=dict)
    held: Mapping[str, tuple[int, PortRecord]] = field(default_factory=dict)
    peers: Mapping[str, str | None] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    managers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    addresses: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PortDecision:
    """What was decided for one port, and why it is not more.

    ``filters`` is how many (MAC, VID) pairs it stands for. ``queue`` is what it holds,
    also while its device is away. ``wants_queue``: it would have one if there were one left.
    """

    name: str
    port_id: int
    state: Literal["waiting", "active", "paused", "failed"]
    path: Literal["queue", "bridge"]
    nic: str | None
    queue: Queue | None
    reason: str | None
    wants_queue: bool


@dataclass(frozen=True)
class Desired:
    """What shall be: ``state`` for the kernel, the rest for people.

    ``refusals`` are reasons not to begin with this config at all; a daemon that is already
    running goes on with what is left.
    """

    state: State
    ports: Mapping[str, PortDecision]
    nic_problems: Mapping[str, tuple[str, ...]]
    refusals: tuple[OffloadError, ...]


def desire(config: Config, facts: Facts) -> Desired:
    """Decide for every switch, NIC and port of ``config``."""
    state: dict[Resource, Value] = {}
    problems: dict[str, list[str]] = {name: [] for name in config.nics}
    refusals: list[OffloadError] = list(_impossible(config, facts))
    usable: set[str] = set()

    for switch_name, switch in config.switches.items():
        state[Bridge(switch_name)] = True
        nic = switch.uplink
        if nic is None:
            continue
        link = facts.links.get(nic)
        if switch_name in facts.links and switch_name not in facts.bridges:
            refusals.append(
                ForeignError(
                    f"there is a device {switch_name} already, and it is no bridge of ours: rename one"
                )
            )
            del state[Bridge(switch_name)]
            continue
        if link is None:
            problems[nic].append(f"{nic} is not there")
            continue
        standing_in_the_way = list(_obstacles(nic, link, switch_name, facts))
        refusals += standing_in_the_way
        problems[nic] += [str(obstacle) for obstacle in standing_in_the_way]
        if standing_in_the_way:
            continue
        usable.add(nic)
        state |= _uplink(nic, link, switch_name, config.nics[nic], facts)

    uplink_of = {name: switch.uplink for name, switch in config.switches.items()}
    queues = {nic: _queues(nic, config, facts, uplink_of) for nic in usable}
    ids = _port_ids(config.ports, facts)
    decisions = {}
    for name, port in config.ports.items():
        nic = uplink_of[port.switch]
        queue = queues[nic].get(name) if nic in queues else None
        decision, resources = _port(name, port, nic if nic in usable else None, queue, ids[name], facts)
        decisions[name] = decision
        state |= resources
    for nic in usable:
        link = facts.links[nic]
        for queue in queues[nic].values():
            if queue.cpu in facts.online_cpus and not facts.detached:
                state[QueueCpu(nic, link.ifindex, queue.cpu)] = RING_SIZE
    return Desired(state, decisions, {name: tuple(told) for name, told in problems.items()}, tuple(refusals))


def _impossible(config: Config, facts: Facts) -> Iterable[OffloadError]:
    """What the config asks of this host that it has not got."""
    missing = [
        Problem(f"nics.{name}", name, "a network device that exists: `ip -br link` lists them")
        for name in config.nics
        if name not in facts.links
    ]
    online = ", ".join(map(str, facts.online_cpus))
    missing += [
        Problem(path, str(cpu), f"a CPU that is online: {online}")
        for path, cpu in cpus_named(config).items()
        if cpu not in facts.online_cpus
    ]
    if missing:
        yield ConfigError(missing)
    tagged = [name for name, port in config.ports.items() if port.vlan.vids != (0,)]
    if tagged:
        why = (
            "VLANs on a kernel bridge are not part of this version"
            if facts.vlan_filtering
            else "this kernel's bridge has no VLAN filtering, so a VLAN would leak"
        )
        yield UnsupportedError(f"ports.{tagged[0]}.vlan: {why}; remove `vlan:`, or use a NIC per VLAN")


def _obstacles(nic: str, link: Link, bridge: str, facts: Facts) -> Iterable[OffloadError]:
    """Why a NIC must not be touched."""
    if link.master_name not in (None, bridge) and link.master_name not in facts.bridges:
        yield ForeignError(
            f"{nic} is already in {link.master_name}, which is not ours: "
            f"`ip link set {nic} nomaster`, or name another NIC"
        )
    ours = facts.programs.get(link.ifindex)
    if link.xdp_prog_id and link.xdp_prog_id != ours:
        yield ForeignError(
            f"{nic} has a foreign XDP program (id {link.xdp_prog_id}): `offload doctor` tells whose it is; "
            f"stop its owner, or `ip link set {nic} xdp off`"
        )
    if link.master_name is None:
        for manager in facts.managers.get(nic, ()):
            yield ForeignError(manager)
        for device, address in facts.addresses.get(nic, ())[:1]:
            yield ForeignError(
                f"{nic} carries the host's address {address} (on {device}), which a bridge would cut off: "
                f"move it to another NIC, or `ip addr del {address} dev {device}`"
            )
    stuck = [feature for feature, can_change in facts.features.get(nic, {}).items() if not can_change]
    if stuck:
        yield UnsupportedError(
            f"{nic} strips VLAN tags before XDP sees them ({stuck[0]} is fixed on): use another NIC"
        )
    if link.kind == "veth" and (why := facts.peers.get(nic)):
        yield UnsupportedError(
            f"{nic} may hide VLAN tags from XDP, and its other end cannot be told not to: {why}"
        )


def _uplink(nic: str, link: Link, bridge: str, settings: NicConfig, facts: Facts) -> dict[Resource, Value]:
    at = (nic, link.ifindex)
    state: dict[Resource, Value] = {
        Ipv6Disabled(*at): True,
        Master(*at): bridge,
        Promiscuous(*at): True,
        AdminUp(*at): _up(link, bridge),
    }
    if facts.detached:
        return state
    state[Uplink(*at)] = (settings.xdp_mode, facts.digest)
    if link.kind == "veth":
        state |= {PeerFeature(*at, feature): False for feature in PEER_TAG_IN_FRAME}
    else:
        state |= {Feature(*at, feature): False for feature in facts.features.get(nic, {})}
    return state


def _up(link: Link, bridge: str) -> bool:
    """A device is set up when it is taken; from then on whoever sets it down means it."""
    return link.up if link.master_name == bridge else True


def _queues(nic: str, config: Config, facts: Facts, uplink_of: Mapping[str, str | None]) -> dict[str, Queue]:
    settings = config.nics[nic].queues
    cpus = [cpu for cpu in settings.cpus or facts.online_cpus if cpu in facts.online_cpus]
    requests = [
        Request(name, port.weight, port.cpu)
        for name, port in config.ports.items()
        if uplink_of[port.switch] == nic and _no_queue(name, port, facts) is None
    ]
    held = {name: Queue(record.queue, record.cpu) for name, (_, record) in facts.held.items() if record.queue}
    wanting = {request.port for request in requests}
    return allocate(
        requests,
        {name: queue for name, queue in held.items() if name in wanting},
        cpus or list(facts.online_cpus),
        settings.max,
    )


def _no_queue(name: str, port: PortConfig, facts: Facts) -> str | None:
    """Why this port shall have no queue, however many there are."""
    if port.queue == "off":
        return "queue: off"
    if port.weight == 0:
        return "weight: 0"
    if name in facts.failed:
        return facts.failed[name]
    link = facts.links.get(port.device or "")
    if link is None:
        return None
    if link.kind not in _REDIRECT_TARGETS:
        return f"{link.name} is no tap and no veth, so XDP cannot hand frames to it"
    if link.kind == "veth" and (why := facts.peers.get(link.name)):
        return why
    return None


def _port_ids(ports: Iterable[str], facts: Facts) -> dict[str, int]:
    """A port keeps its id; new ones get the lowest that nobody has."""
    ids = {name: held[0] for name, held in facts.held.items()}
    taken = set(ids.values())
    free = (number for number in range(len(taken) + len(ids) + 65_536) if number not in taken)
    return {name: ids[name] if name in ids else next(free) for name in ports}


def _port(
    name: str, port: PortConfig, nic: str | None, queue: Queue | None, port_id: int, facts: Facts
) -> tuple[PortDecision, dict[Resource, Value]]:
    """The decision for one port, and its part of the desired state."""
    link = facts.links.get(port.device or "")
    obstacle = _port_obstacle(name, port, link, facts)
    present = link if obstacle is None else None
    pvid = port.vlan.native or 0
    flags = 0
    if port.vlan.trunk:
        flags |= TRUNK
    reason = obstacle[1] if obstacle else None
    status: Literal["waiting", "active", "paused", "failed"] = obstacle[0] if obstacle else "active"
    no_queue = _no_queue(name, port, facts)

    state: dict[Resource, Value] = {}
    running = False
    if present:
        at = (present.name, present.ifindex)
        state |= {
            Ipv6Disabled(*at): True,
            Guard(*at): (port_id, pvid, facts.guard_digest),
            Master(*at): port.switch,
            BridgePort(*at): (False, False),
            AdminUp(*at): _up(present, port.switch),
        }
        state |= {Fdb(*at, mac): True for mac in port.mac}
        taken = present.master_name == port.switch
        if (taken and not present.up) or (present.up and not present.running):
            status = "paused"
            reason = (
                f"{present.name} is down" if not present.up else f"the other end of {present.name} is down"
            )
        elif queue and not facts.detached:
            running = True
            if present.kind == "tun":
                flags |= NO_FRAGS | FRAGS_POSSIBLE
            if nic and max(facts.links[nic].mtu, present.mtu) > ONE_BUFFER:
                flags |= FRAGS_POSSIBLE
            if not facts.redirects_frags:
                flags |= NO_FRAGS
            if present.kind == "veth":
                state[PeerFeature(*at, NAPI)] = True
    record = PortRecord(
        name=name,
        queue=queue.id if queue else 0,
        cpu=queue.cpu if queue else None,
        pvid=pvid,
        flags=flags | (RUNNING if running else 0),
        max_len=present.mtu + ETHERNET_HEADER if present else 0,
        ifindex=present.ifindex if present else 0,
    )
    state[PortSlot(port_id)] = record.as_value()
    if nic and queue and not facts.detached:
        state |= {
            Filter(nic, facts.links[nic].ifindex, mac, vid): port_id
            for mac in port.mac
            for vid in port.vlan.vids
        }
    if reason is None and not running:
        reason = _why_bridge(nic, no_queue, facts)
    decision = PortDecision(
        name=name,
        port_id=port_id,
        state=status,
        path="queue" if running else "bridge",
        nic=nic,
        queue=queue if nic else None,
        reason=reason,
        wants_queue=nic is not None and queue is None and no_queue is None,
    )
    return decision, state


def _why_bridge(nic: str | None, no_queue: str | None, facts: Facts) -> str:
    if no_queue:
        return no_queue
    if facts.detached:
        return "the fast path is detached: `offload apply FILE` puts it back"
    if nic is None:
        return "its switch has no NIC that could sort frames"
    return "no queue is left: queues.max of the NIC is reached"


def _port_obstacle(
    name: str, port: PortConfig, link: Link | None, facts: Facts
) -> tuple[Literal["waiting", "failed"], str] | None:
    """Why a port's device cannot be taken: its state and the reason."""
    if name in facts.failed:
        return ("failed", facts.failed[name])
    if link is None:
        return ("waiting", f"there is no device {port.device} yet")
    if link.master_name is not None and link.master_name not in facts.bridges:
        return (
            "failed",
            f"{link.name} is in {link.master_name}, which is not ours: `ip link set {link.name} nomaster`",
        )
    if not link.mac:
        return ("failed", f"{link.name} carries no Ethernet frames: a tap is needed, not a tun")
    if link.mac in port.mac:
        return ("failed", f"{link.name} itself has the VM's MAC {link.mac}: give the host's end another one")
    if _RECYCLED.fullmatch(link.name) and not any(_fits(link.mac, mac) for mac in port.mac):
        return (
            "waiting",
            f"{link.name} belongs to another VM (its MAC is {link.mac}): libvirt recycles such names; "
            f"give the VM a fixed one, <target dev='{name}'/>",
        )
    return None


def _fits(tap: str, guest: str) -> bool:
    """libvirt gives a tap its guest's MAC with the first byte replaced."""
    return tap.partition(":")[2] == guest.partition(":")[2]


_ORDER: tuple[type[Resource], ...] = (
    Bridge,
    Ipv6Disabled,
    Feature,
    PeerFeature,
    Guard,
    Master,
    BridgePort,
    Fdb,
    AdminUp,
    Promiscuous,
    Uplink,
    QueueCpu,
    PortSlot,
    Filter,
)
"""In which order things are set. A port is guarded before it is in the bridge, and everything
stands before the first filter sends a frame there. Things are unset in reverse."""

SETTINGS = (Master, AdminUp, Promiscuous, Feature, PeerFeature, Ipv6Disabled)
"""Settings of devices that are not ours: journalled before they are changed, and given back."""


def difference(observed: State, desired: State, originals: State) -> tuple[Change, ...]:
    """The steps from ``observed`` to ``desired``: first everything that goes, then everything that comes.

    Ports stop before anything else, and CPUs that no queue needs any more are released last.
    What is no longer desired is removed if it is ours, and given its original value if it
    is a setting of somebody's device.
    """
    unset, put = [], []
    for resource, value in desired.items():
        if observed.get(resource) != value:
            put.append(Change(resource, observed.get(resource), value))
    for resource, value in observed.items():
        if resource in desired or isinstance(resource, BridgePort):
            continue
        after = originals.get(resource) if isinstance(resource, SETTINGS) else None
        if isinstance(resource, SETTINGS) and resource not in originals:
            continue
        if value != after:
            unset.append(Change(resource, value, after))
    unset.sort(key=lambda change: -_ORDER.index(type(change.resource)))
    put.sort(key=lambda change: _ORDER.index(type(change.resource)))
    detached = {change.resource.ifindex for change in unset if isinstance(change.resource, Uplink)}
    idle = [
        change
        for change in unset
        if isinstance(change.resource, QueueCpu) and change.resource.ifindex not in detached
    ]
    stops = [stop for change in (*unset, *put) if (stop := _stop(change))]
    unset = [_after_stop(change) for change in unset if change not in idle]
    put = [_after_stop(change) for change in put]
    return tuple(change for change in (*stops, *unset, *put, *idle) if change.before != change.after)


def _stop(change: Change) -> Change | None:
    """The step that sends a port's frames to the bridge, where it is not to run as it did.

    That comes before its filters go, so that frames on their way still find whose they are.
    """
    if not isinstance(change.resource, PortSlot) or not isinstance(change.before, tuple):
        return None
    before = PortRecord.of(change.before)
    after = PortRecord.of(change.after) if isinstance(change.after, tuple) else None
    if not before.flags & RUNNING or (after and after.flags & RUNNING):
        return None
    return Change(change.resource, change.before, _stopped(before).as_value())


def _after_stop(change: Change) -> Change:
    """What is left of a change when ``_stop`` of it is done."""
    stop = _stop(change)
    return replace(change, before=stop.after) if stop else change


def _stopped(record: PortRecord) -> PortRecord:
    return replace(record, flags=record.flags & ~RUNNING)


def without_fast_path(observed: State) -> dict[Resource, Value]:
    """What ``offload detach`` leaves: the bridges and their ports as they are, nothing of XDP."""
    kept = (Bridge, Master, BridgePort, Fdb, Guard, AdminUp, Promiscuous, Ipv6Disabled)
    state: dict[Resource, Value] = {
        resource: value for resource, value in observed.items() if isinstance(resource, kept)
    }
    for resource, value in observed.items():
        if isinstance(resource, PortSlot) and isinstance(value, tuple):
            state[resource] = _stopped(PortRecord.of(value)).as_value()
    return state
