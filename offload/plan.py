"""From a config and the facts to what the kernel shall be, and from there to the steps. Pure.

``desire`` decides everything that is decided about a port or a NIC; ``difference`` knows
nothing of either, only in which order things may be set and unset. Nothing
here reads or writes anything, so every case is a table in the tests.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from . import bonds, channels, switches, takeover
from .config import (
    Config,
    NicConfig,
    PortConfig,
    VlanMode,
    conduit_inner,
    cpus_named,
    host_inner,
)
from .errors import ConfigError, ForeignError, OffloadError, Problem, UnsupportedError
from .model import (
    Address,
    AdminUp,
    Bridge,
    BridgePort,
    BridgeVlans,
    Carried,
    Change,
    Channel,
    Conduit,
    Fdb,
    Feature,
    Filter,
    HostPair,
    Ipv6Disabled,
    Link,
    LinkDns,
    Master,
    Member,
    MemberRow,
    Network,
    NicSockets,
    PeerFeature,
    PortRecord,
    PortSlot,
    Promiscuous,
    PythonBridge,
    QueueCpu,
    Resource,
    Roster,
    Route,
    State,
    Station,
    StationRow,
    StationState,
    Trunk,
    Uplink,
    Value,
)
from .queues import Queue, Request, allocate
from .switches import Switch

RUNNING, TRUNK, NO_FRAGS, FRAGS_POSSIBLE, BYPASS, SOCKETS = 1, 2, 4, 8, 16, 32
"""Port flags, as in ``bpf/abi.h``."""

RING_SIZE = 4096
"""Frames that may wait for a queue's CPU. The kernel takes up to 16,384."""

ETHERNET_HEADER = 14
STANDARD_MTU = 1_500
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
    be switched off. ``held`` is the port table: id, queue and flags by port name. ``own`` are the
    bridges and veth pairs that we made, ``members`` the devices that are in a switch, by ifindex, with
    the version of their programs, ``networks`` the switches' numbers, ``stations`` where each address
    is, by number, MAC and VID.
    ``redirects_frags``: XDP can hand a frame of several buffers to a device that takes such frames.
    ``af_xdp`` is what AF_XDP ports need to know.
    """

    links: Mapping[str, Link]
    online_cpus: tuple[int, ...]
    vlan_filtering: bool = False
    redirects_frags: bool = True
    digest: str = ""
    switch_digest: str = ""
    detached: bool = False
    own: frozenset[str] = frozenset()
    members: Mapping[int, tuple[MemberRow, str]] = field(default_factory=dict)
    networks: Mapping[str, int] = field(default_factory=dict)
    stations: Mapping[tuple[int, str, int], StationRow] = field(default_factory=dict)
    programs: Mapping[int, int] = field(default_factory=dict)
    held: Mapping[str, tuple[int, PortRecord]] = field(default_factory=dict)
    peers: Mapping[str, str | None] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    managers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    addresses: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    bonds: Mapping[str, bonds.Bond] = field(default_factory=dict)
    host: takeover.HostNetwork = field(default_factory=takeover.HostNetwork)
    af_xdp: channels.Host = field(default_factory=channels.Host)
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
    path: Literal["queue", "af_xdp", "bridge"]
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
    facts = replace(facts, links={**channels.to_come(config, facts.links), **facts.links})
    ids = _ids(config, facts)
    nic_problems: dict[str, list[str]] = {name: [] for name in config.nics}
    refusals: list[OffloadError] = [
        *_impossible(config, facts),
        *channels.refusals(config, facts.links, facts.own, facts.af_xdp),
    ]
    state: dict[Resource, Value] = {}
    standing: dict[str, Switch] = {}
    for name, number in _numbers(config, facts).items():
        if taken := [*_names_taken(name, config, facts)]:
            refusals += taken
            continue
        nic = config.switches[name].uplink
        link = facts.links.get(nic or "")
        in_the_way = [*_obstacles(nic, link, name, config, facts)] if nic and link else []
        if nic:
            nic_problems[nic] += [str(obstacle) for obstacle in in_the_way]
            nic_problems[nic] += [] if link else [f"{nic} is not there"]
        refusals += in_the_way
        usable = nic if link and not in_the_way else None
        switch = switches.decided(name, config, number, usable, facts.vlan_filtering)
        refusals += _vlan_refusals(switch, config)
        standing[name] = switch
        uplink_id = ids[_uplink_name(usable)] if usable else None
        state |= switches.standing(switch, facts.links, uplink_id, facts.switch_digest)
        if usable and link:
            state |= _uplink(switch, link, ids[_uplink_name(usable)], config.nics[usable], facts)

    nics = [switch.nic for switch in standing.values() if switch.nic]
    queues = {nic: _queues(nic, config, facts) for nic in nics}
    decisions = {}
    for name, port in config.ports.items():
        decided = _port(name, port, standing.get(port.switch), queues, ids[name], facts)
        decisions[name] = decided.decision
        state |= decided.state
    for switch in standing.values():
        state |= _host(switch, ids, facts)
        if switch.python:
            state[Roster(switch.name)] = _roster(switch, config, ids, facts)
            state[PythonBridge(switch.name)] = True
    for nic in nics:
        for queue in queues[nic].values():
            if queue.cpu in facts.online_cpus and not facts.detached:
                state[QueueCpu(nic, facts.links[nic].ifindex, queue.cpu)] = RING_SIZE
    problems = {name: tuple(told) for name, told in nic_problems.items()}
    return Desired(state, decisions, problems, tuple(refusals))


def _names_taken(name: str, config: Config, facts: Facts) -> Iterable[OffloadError]:
    """A device that is not ours has a name that a switch needs."""
    switch = config.switches[name]
    needed = {name: "the switch"}
    if switch.bridge == "python":
        needed[conduit_inner(name)] = "the Python bridge"
    if switch.host:
        needed[switch.host.interface] = "the host's interface"
        needed[host_inner(switch.host.interface)] = "the host's interface at the switch"
    for device, what in needed.items():
        if device in facts.links and device not in facts.own:
            yield ForeignError(
                f"there is a device {device} already, and it is not ours, so {what} cannot have "
                "that name: rename one"
            )


def _vlan_refusals(switch: Switch, config: Config) -> Iterable[OffloadError]:
    tagged = switch.vids - {0}
    if tagged and not switch.python and not switch.filters_vlans:
        yield UnsupportedError(
            f"{_who_has_vlans(switch, config)}: this kernel's bridge has no VLAN filtering "
            f"(CONFIG_BRIDGE_VLAN_FILTERING), so VLAN {min(tagged)} would leak: use `bridge: python`, "
            "or remove `vlan:`"
        )
    if switch.filters_vlans and not switch.untagged:
        yield UnsupportedError(
            f"switches.{switch.name}: its ports use every VID, and a kernel bridge needs one for "
            "untagged frames: take one out of a trunk, or use `bridge: python`"
        )


def _who_has_vlans(switch: Switch, config: Config) -> str:
    """Path and value of the first `vlan:` in a switch."""
    host = switch.config.host
    if host and host.vlan:
        return f"switches.{switch.name}.host.vlan: {host.vlan}"
    name, port = next(
        (name, port)
        for name, port in config.ports.items()
        if port.switch == switch.name and any(port.vlan.vids)
    )
    return f"ports.{name}.vlan: {port.vlan}"


def _uplink_name(nic: str) -> str:
    """The name of a NIC's row in the port table; ports have no colon in their names."""
    return f"uplink:{nic}"


def _host_name(switch: str) -> str:
    return f"host:{switch}"


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
    missing += channels.missing_users(config, facts.af_xdp)
    if missing:
        yield ConfigError(missing)


def _obstacles(nic: str, link: Link, switch: str, config: Config, facts: Facts) -> Iterable[OffloadError]:
    """Why a NIC must not be touched."""
    of_bonds = [*bonds.refusals(nic, facts.links, config.nics[nic].xdp_mode, facts.bonds.get(nic))]
    yield from of_bonds
    if not of_bonds and link.master_name is not None and link.master_name not in facts.own:
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
    if link.ifindex not in facts.members:
        for manager in facts.managers.get(nic, ()):
            yield ForeignError(manager)
        for device, address in facts.addresses.get(nic, ())[:1]:
            yield ForeignError(
                f"{device}, which is over {nic}, carries the host's address {address}, which a bridge would "
                f"cut off: move it to another NIC, or `ip addr del {address} dev {device}`"
            )
    joined = link.ifindex in facts.members
    for refusal in takeover.refusals(nic, config.switches[switch].host, facts.host, joined=joined):
        yield ForeignError(refusal)
    stuck = [feature for feature, can_change in facts.features.get(nic, {}).items() if not can_change]
    if stuck:
        yield UnsupportedError(
            f"{nic} strips VLAN tags before XDP sees them ({stuck[0]} is fixed on): use another NIC"
        )
    if link.kind == "veth" and (why := facts.peers.get(nic)):
        yield UnsupportedError(
            f"{nic} may hide VLAN tags from XDP, and its other end cannot be told not to: {why}"
        )


def _uplink(
    switch: Switch, link: Link, port_id: int, settings: NicConfig, facts: Facts
) -> dict[Resource, Value]:
    at = (link.name, link.ifindex)
    flags = 0 if facts.detached else BYPASS
    row = PortRecord(_uplink_name(link.name), 0, None, 0, flags, link.mtu + ETHERNET_HEADER, link.ifindex)
    member = MemberRow(port_id, switch.number, "uplink", bypass=not facts.detached)
    state = switches.wired(switch, at, member, facts.switch_digest)
    state |= {
        Promiscuous(*at): True,
        AdminUp(*at): _up(link, facts),
        PortSlot(port_id): row.as_value(),
    }
    if facts.detached:
        return state
    state[Uplink(*at)] = (settings.xdp_mode, facts.digest)
    if link.kind == "veth":
        state |= {PeerFeature(*at, feature): False for feature in PEER_TAG_IN_FRAME}
    else:
        state |= {Feature(*at, feature): False for feature in facts.features.get(link.name, {})}
    return state


def _up(link: Link, facts: Facts) -> bool:
    """A device is set up when it is taken; from then on whoever sets it down means it."""
    return link.up if link.ifindex in facts.members else True


_HOST_MAY = frozenset({"dhcp_server", "router_advertisement"})


def _host(switch: Switch, ids: Mapping[str, int], facts: Facts) -> dict[Resource, Value]:
    """The host in a switch: a veth pair whose one end is a port like any other."""
    host = switch.config.host
    if host is None:
        return {}
    inner = host_inner(host.interface)
    uplink = facts.links.get(switch.nic or "")
    link, inner_link = facts.links.get(host.interface), facts.links.get(inner)
    at = (inner, inner_link.ifindex if inner_link else 0)
    port_id = ids[_host_name(switch.name)]
    # The NIC's own address, so that neighbours and leases stay true when the host moves in.
    mac = host.mac or (uplink.mac if uplink else link.mac if link else "auto")
    mode = VlanMode(native=host.vlan or 0)
    row = MemberRow(
        port_id, switch.number, "host", pvid=host.vlan or 0, bypass=not facts.detached, allow=_HOST_MAY
    )
    stations: dict[str, StationState] = {}
    if mac != "auto":
        stations[mac] = _host_is(switch.number, mac, host.vlan or 0, port_id, at[1], facts)
    mtu = uplink.mtu if uplink else link.mtu if link else STANDARD_MTU
    slot = PortRecord(
        name=_host_name(switch.name),
        queue=0,
        cpu=None,
        pvid=host.vlan or 0,
        flags=BYPASS if inner_link and not facts.detached else 0,
        max_len=mtu + ETHERNET_HEADER,
        ifindex=at[1],
    )
    return {
        **switches.joined(switch, at, row, mode, stations, facts.switch_digest),
        **takeover.desired(host, uplink, facts.host),
        HostPair(host.interface, inner): (mac, mtu),
        PortSlot(port_id): slot.as_value(),
        AdminUp(*at): True,
        AdminUp(host.interface, link.ifindex if link else 0): _up_once(inner_link, link, facts),
    }


def _up_once(inner: Link | None, link: Link | None, facts: Facts) -> bool:
    return link.up if link and inner and inner.ifindex in facts.members else True


def _host_is(number: int, mac: str, vid: int, port_id: int, ifindex: int, facts: Facts) -> StationState:
    """The host is there without having to say so; what the wire says of its address counts all the same."""
    row = facts.stations.get((number, mac, vid))
    return row.state if row and (row.port, row.ifindex) == (port_id, ifindex) else "here"


def _roster(switch: Switch, config: Config, ids: Mapping[str, int], facts: Facts) -> tuple[object, ...]:
    """What the Python bridge of a switch is told."""
    entries = []
    if switch.nic:
        entries.append(
            switches.listed(
                ids[_uplink_name(switch.nic)],
                switch.nic,
                "uplink",
                switch.vids | {0},
                {},
                flood=True,
                link_local=switch.link_local,
            )
        )
    host = switch.config.host
    if host:
        vids = (host.vlan or 0,)
        entries.append(
            switches.listed(
                ids[_host_name(switch.name)], "host", "host", vids, {}, flood=True, link_local=False
            )
        )
    for name, port in config.ports.items():
        link = facts.links.get(port.device or "")
        if port.switch != switch.name or link is None or _port_obstacle(name, port, link, facts):
            continue
        stations = switches.where(switch, port.mac, port.vlan, ids[name], link.ifindex, facts.stations)
        entries.append(
            switches.listed(
                ids[name],
                name,
                "port",
                port.vlan.vids,
                stations,
                flood=port.allow.mac_spoofing or "expected" in stations.values(),
                link_local=port.allow.link_local_protocols,
            )
        )
    extensions = [extension.model_dump(mode="json") for extension in switch.config.extensions]
    return (tuple(entries), json.dumps(extensions))


def _queues(nic: str, config: Config, facts: Facts) -> dict[str, Queue]:
    settings = config.nics[nic].queues
    cpus = [cpu for cpu in settings.cpus or facts.online_cpus if cpu in facts.online_cpus]
    requests = [
        Request(name, port.weight, port.cpu)
        for name, port in config.ports.items()
        if config.switches[port.switch].uplink == nic and _no_queue(name, port, facts) is None
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


def _ids(config: Config, facts: Facts) -> dict[str, int]:
    """Rows of the port table by name: a port keeps its id; new ones get the lowest that nobody has."""
    names = [*config.ports]
    for name, switch in config.switches.items():
        names += [_uplink_name(switch.uplink)] if switch.uplink else []
        names += [_host_name(name)] if switch.host else []
    return _numbered(names, {name: port_id for name, (port_id, _) in facts.held.items()})


def _numbers(config: Config, facts: Facts) -> dict[str, int]:
    """The numbers of the switches, in the order of the config."""
    return _numbered(config.switches, facts.networks)


def _numbered(names: Iterable[str], held: Mapping[str, int]) -> dict[str, int]:
    taken = set(held.values())
    free = (number for number in itertools.count() if number not in taken)
    return {name: held[name] if name in held else next(free) for name in names}


@dataclass(frozen=True)
class _Decided:
    """The decision for one port, and its part of the desired state."""

    decision: PortDecision
    state: Mapping[Resource, Value]


def _port(
    name: str,
    port: PortConfig,
    switch: Switch | None,
    queues: Mapping[str, Mapping[str, Queue]],
    port_id: int,
    facts: Facts,
) -> _Decided:
    nic = switch.nic if switch else None
    queue = queues[nic].get(name) if nic else None
    link = facts.links.get(port.device or "")
    obstacle = _port_obstacle(name, port, link, facts)
    if switch is None:
        obstacle = ("failed", f"its switch {port.switch} cannot be made")
    present = link if obstacle is None else None
    flags = TRUNK if port.vlan.trunk else 0
    reason = obstacle[1] if obstacle else None
    status: Literal["waiting", "active", "paused", "failed"] = obstacle[0] if obstacle else "active"
    no_queue = _no_queue(name, port, facts)

    state: dict[Resource, Value] = {}
    stations: Mapping[str, StationState] = {}
    running = False
    if present and switch:
        at = (present.name, present.ifindex)
        stations = switches.where(switch, port.mac, port.vlan, port_id, present.ifindex, facts.stations)
        bypass = port.queue != "off" and not facts.detached
        row = MemberRow(
            port_id,
            switch.number,
            "port",
            pvid=port.vlan.native,
            trunk=bool(port.vlan.trunk),
            bypass=bypass,
            allow=frozenset(allowed for allowed, yes in port.allow if yes),
        )
        state |= switches.joined(switch, at, row, port.vlan, stations, facts.switch_digest)
        state[AdminUp(*at)] = _up(present, facts)
        taken = present.ifindex in facts.members
        if (taken and not present.up) or (present.up and not present.running):
            status = "paused"
            reason = (
                f"{present.name} is down" if not present.up else f"the other end of {present.name} is down"
            )
        else:
            flags |= BYPASS if bypass else 0
            running = queue is not None and not facts.detached
        if running:
            flags |= RUNNING | _frag_flags(present, nic, facts)
            if present.kind == "veth" and not port.af_xdp:
                state[PeerFeature(*at, NAPI)] = True
        if port.af_xdp:
            state |= channels.desired(
                name, port, present, port_id, None if facts.detached else nic, facts.af_xdp
            )
            flags |= SOCKETS if running and port.af_xdp.mode == "hardware" else 0
    record = PortRecord(
        name=name,
        queue=queue.id if queue else 0,
        cpu=queue.cpu if queue else None,
        pvid=port.vlan.native or 0,
        flags=flags,
        max_len=present.mtu + ETHERNET_HEADER if present else 0,
        ifindex=present.ifindex if present else 0,
    )
    state[PortSlot(port_id)] = record.as_value()
    here = [mac for mac, where in stations.items() if where == "here"]
    if nic and queue and not facts.detached:
        state |= {
            Filter(nic, facts.links[nic].ifindex, mac, vid): port_id for mac in here for vid in port.vlan.vids
        }
    if reason is None and not running:
        reason = _why_bridge(port, switch, no_queue, facts)
    if reason is None:
        reason = _why_not_here(stations, nic)
    decision = PortDecision(
        name=name,
        port_id=port_id,
        state=status,
        path="bridge" if not (running and here) else "af_xdp" if port.af_xdp else "queue",
        nic=nic,
        queue=queue if nic else None,
        reason=reason,
        wants_queue=nic is not None and queue is None and no_queue is None,
    )
    return _Decided(decision, state)


def _frag_flags(link: Link, nic: str | None, facts: Facts) -> int:
    """What must be known of frames of several buffers before they are handed to a device."""
    flags = 0
    if link.kind == "tun":
        flags |= NO_FRAGS | FRAGS_POSSIBLE
    if nic and max(facts.links[nic].mtu, link.mtu) > ONE_BUFFER:
        flags |= FRAGS_POSSIBLE
    if not facts.redirects_frags:
        flags |= NO_FRAGS
    return flags


def _why_not_here(stations: Mapping[str, StationState], nic: str | None) -> str | None:
    """Why an address has no filter although its port has a queue."""
    away = [mac for mac, where in stations.items() if where == "away"]
    if away:
        return (
            f"{away[0]} was last heard from {nic or 'elsewhere'}: "
            "the VM has moved, or another has its address"
        )
    expected = [mac for mac, where in stations.items() if where == "expected"]
    return f"nothing has been heard from {expected[0]} yet" if expected else None


def _why_bridge(port: PortConfig, switch: Switch | None, no_queue: str | None, facts: Facts) -> str | None:
    """Why a port is not on the fast path; nothing where none could be asked for."""
    if no_queue:
        return no_queue
    if switch and switch.config.uplink is None and port.queue == "auto":
        return None
    if facts.detached:
        return "the fast path is detached: `offload apply FILE` puts it back"
    if switch is None or switch.nic is None:
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
    if port.af_xdp and link.ifindex and link.name not in facts.own:
        return ("failed", f"there is a device {link.name} already, and it is not ours: rename it")
    if link.master_name is not None and link.master_name not in facts.own:
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
    Conduit,
    HostPair,
    Channel,
    Ipv6Disabled,
    Feature,
    PeerFeature,
    Network,
    Roster,
    PythonBridge,
    Trunk,
    Station,
    Member,
    Master,
    BridgeVlans,
    BridgePort,
    Fdb,
    AdminUp,
    Promiscuous,
    Address,
    LinkDns,
    Route,
    Carried,
    Uplink,
    QueueCpu,
    NicSockets,
    PortSlot,
    Filter,
)
"""In which order things are set. A device has its programs before it is in the bridge, and everything
stands before the first filter sends a frame there. Things are unset in reverse."""

SETTINGS = (Master, AdminUp, Promiscuous, Feature, PeerFeature, Ipv6Disabled, Carried, Route)
"""Settings of devices that are not ours: journalled before they are changed, and given back."""


def difference(observed: State, desired: State, originals: State) -> tuple[Change, ...]:
    """The steps from ``observed`` to ``desired``: first everything that goes, then everything that comes.

    Ports stop before anything else, and CPUs that no queue needs any more are released last.
    What is no longer desired is removed if it is ours, and given its original value if it
    is a setting of somebody's device.
    """
    observed = _without_left_bridges(observed, desired)
    unset, put = [], []
    for resource, value in desired.items():
        if observed.get(resource) != value:
            put.append(Change(resource, observed.get(resource), value))
    for resource, value in observed.items():
        if resource in desired or isinstance(resource, (BridgePort, BridgeVlans)):
            continue  # these go with the bridge
        after = originals.get(resource) if isinstance(resource, SETTINGS) else None
        if isinstance(resource, SETTINGS) and resource not in originals:
            continue
        if value != after:
            unset.append(Change(resource, value, after))
    carrying = {resource.ifindex for resource in (*observed, *desired) if isinstance(resource, Carried)}
    unset.sort(key=lambda change: (-_place(change, carrying), takeover.rank(change)))
    put.sort(key=lambda change: (_place(change, carrying), takeover.rank(change)))
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


def _without_left_bridges(observed: State, desired: State) -> State:
    """``observed`` less what a device that moves to another bridge has at its old one: it starts anew."""
    movers = {
        resource.ifindex
        for resource, value in desired.items()
        if isinstance(resource, Master) and observed.get(resource) != value
    }
    return {
        resource: value
        for resource, value in observed.items()
        if not (isinstance(resource, (BridgePort, BridgeVlans)) and resource.ifindex in movers)
    }


def _place(change: Change, carrying: Collection[int]) -> int:
    """Where a change stands in the order of setting.

    Switching IPv6 off takes a device's addresses away, so it waits until these have moved.
    """
    resource = change.resource
    if isinstance(resource, Ipv6Disabled) and resource.ifindex in carrying:
        return len(_ORDER)
    return _ORDER.index(type(resource))


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
    return replace(record, flags=record.flags & ~(RUNNING | BYPASS))


def without_fast_path(observed: State) -> dict[Resource, Value]:
    """What ``offload detach`` leaves: the switches as they are, nothing of XDP and nothing past a bridge."""
    gone = (Uplink, QueueCpu, Filter, NicSockets, Feature, PeerFeature)
    state: dict[Resource, Value] = {
        resource: value for resource, value in observed.items() if not isinstance(resource, gone)
    }
    for resource, value in state.items():
        if isinstance(resource, PortSlot) and isinstance(value, tuple):
            state[resource] = _stopped(PortRecord.of(value)).as_value()
        if isinstance(resource, Member) and isinstance(value, tuple):
            state[resource] = replace(MemberRow.of(value), bypass=False).as_value(str(value[-1]))
    return state
