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

from . import bonds, channels, steering, switches, takeover
from .config import (
    Config,
    PortConfig,
    VlanMode,
    conduit_inner,
    cpus_named,
    host_inner,
)
from .errors import ConfigError, ForeignError, OffloadError, Problem, UnsupportedError
from .hardware import Hardware
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
    FunctionAddress,
    FunctionPort,
    Functions,
    HostPair,
    Ipv6Disabled,
    IrqAffinity,
    Link,
    LinkDns,
    Master,
    Member,
    MemberRow,
    NapiAffinity,
    Network,
    NicAddress,
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
    Spread,
    State,
    Station,
    StationRow,
    StationState,
    SteeringRule,
    Trunk,
    Uplink,
    Value,
    Xps,
)
from .queues import Queue, Request, allocate
from .switches import Switch

RUNNING, TRUNK, NO_FRAGS, FRAGS_POSSIBLE, BYPASS, SOCKETS, GRO, GRO_TCP = 1, 2, 4, 8, 16, 32, 64, 128
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
NAPI = MERGING = "rx-gro"
"""A veth takes redirected frames only while its other end polls, which GRO switches on. On a NIC it
merges frames that XDP leaves to the stack."""

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
    ``af_xdp`` is what AF_XDP ports need to know. ``hardware`` is what each uplink offers for hardware
    queues, ``own_rules`` MAC and VID of the steering rules there that are ours. ``moved`` are CPUs that
    queues shall move to, by port, ``ages`` the order in which ports came. ``merging`` tells whether TCP of
    ports with ``delivery: auto`` shall be merged from now on; for others it stays as it is.
    """

    links: dict[str, Link]
    online_cpus: tuple[int, ...]
    vlan_filtering: bool = False
    redirects_frags: bool = True
    digest: str = ""
    switch_digest: str = ""
    detached: bool = False
    own: frozenset[str] = frozenset()
    members: dict[int, tuple[MemberRow, str]] = field(default_factory=dict)
    networks: Mapping[str, int] = field(default_factory=dict)
    stations: dict[tuple[int, str, int], StationRow] = field(default_factory=dict)
    programs: Mapping[int, int] = field(default_factory=dict)
    held: dict[str, tuple[int, PortRecord]] = field(default_factory=dict)
    peers: dict[str, str | None] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    managers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    addresses: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    bonds: Mapping[str, bonds.Bond] = field(default_factory=dict)
    host: takeover.HostNetwork = field(default_factory=takeover.HostNetwork)
    af_xdp: channels.Host = field(default_factory=channels.Host)
    hardware: Mapping[str, Hardware] = field(default_factory=dict)
    own_rules: Mapping[str, frozenset[tuple[str, int]]] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)
    ages: Mapping[str, int] = field(default_factory=dict)
    merging: Mapping[str, bool] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PortDecision:
    """What was decided for one port, and why it is not more.

    ``filters`` is how many (MAC, VID) pairs it stands for. ``queue`` is what it holds,
    also while its device is away. ``wants_queue``: it would have one if there were one left.
    ``queue_device`` is the virtual function's device that is the queue, if one is, ``rx_queue`` the NIC's RX
    queue that a rule was read back to give the port's frames to. ``queue_standing``: the NIC has been
    read back to sort the port's frames into its hardware queue. ``delivery``: which frames are merged (GRO)
    before the device gets them, none, those of TCP, or all; ``None`` without a queue. ``adapts``: that goes
    by what comes.
    """

    name: str
    port_id: int
    state: Literal["waiting", "active", "paused", "failed"]
    path: Literal["queue", "af_xdp", "bridge"]
    nic: str | None
    queue: Queue | None
    reason: str | None
    wants_queue: bool
    queue_device: str | None = None
    rx_queue: int | None = None
    queue_standing: bool = False
    delivery: Literal["frames", "tcp", "gro"] | None = None
    adapts: bool = False


@dataclass(frozen=True)
class Desired:
    """What shall be: ``state`` for the kernel, the rest for people.

    ``refusals`` are reasons not to begin with this config at all; a daemon that is already
    running goes on with what is left. ``nics`` are the uplinks, with what they were found to have,
    ``queues`` who has which queue of each, ``switches`` what was decided about each switch. ``shares`` are
    the parts of ``state`` that each port brings.
    """

    state: dict[Resource, Value]
    ports: dict[str, PortDecision]
    nic_problems: Mapping[str, tuple[str, ...]]
    refusals: tuple[OffloadError, ...]
    nics: Mapping[str, steering.Nic] = field(default_factory=dict)
    queues: Mapping[str, Mapping[str, Queue]] = field(default_factory=dict)
    switches: Mapping[str, Switch] = field(default_factory=dict)
    shares: dict[str, Mapping[Resource, Value]] = field(default_factory=dict)


def desire(config: Config, facts: Facts) -> Desired:
    """Decide for every switch, NIC and port of ``config``."""
    facts = replace(facts, links={**channels.to_come(config, facts.links), **facts.links})
    ids = port_ids(config, facts)
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
            state |= _uplink(switch, _nic(switch, usable, ids, config, facts), config, facts)

    nics = {
        switch.nic: _nic(switch, switch.nic, ids, config, facts) for switch in standing.values() if switch.nic
    }
    queues = {name: _queues(nic, config, facts) for name, nic in nics.items()}
    decisions, shares = {}, {}
    steered: dict[str, list[steering.Steered]] = {name: [] for name in nics}
    for name, port in config.ports.items():
        decided = _port(name, port, standing.get(port.switch), nics, queues, ids[name], facts)
        decisions[name], shares[name] = decided.decision, decided.state
        state |= decided.state
        if decided.steered and decided.decision.nic:
            steered[decided.decision.nic].append(decided.steered)
    refusals += _no_hardware(config, nics, facts)
    for switch in standing.values():
        state |= _host(switch, ids, facts)
        if switch.python:
            state[Roster(switch.name)] = _roster(switch, config, ids, facts)
            state[PythonBridge(switch.name)] = True
    for name, uplink in nics.items() if not facts.detached else ():
        state |= _queue_cpus(uplink, queues[name], facts)
        state |= steering.steered(uplink, steered[name], _macs_of(name, config))
    problems = {name: tuple(told) for name, told in nic_problems.items()}
    return Desired(state, decisions, problems, tuple(refusals), nics, queues, standing, shares)


def desire_again(
    config: Config, facts: Facts, changed: Collection[str], around: Collection[str], before: Desired
) -> tuple[Desired, set[Resource]] | None:
    """As ``desire``, where nothing has changed since ``before`` but some ports, their devices and stations.

    ``around`` are the switches that these ports are or were in. Also says which resources that is about.
    ``None`` where it is about more than these ports: a switch that is another now (by its VLANs,
    say), a queue of another port, a NIC or a bridge that is told of all ports.
    """
    if before.refusals or facts.detached:
        return None
    if coming := channels.to_come(config, facts.links):
        facts = replace(facts, links=coming | facts.links)
    nics = {}
    for name in around:
        known = before.switches.get(name)
        if (
            known is None
            or known.python
            or known != switches.decided(name, config, known.number, known.nic, facts.vlan_filtering)
        ):
            return None
        if known.nic:
            nics[known.nic] = before.nics[known.nic]
    if any(nic.hardware.how for nic in nics.values()):
        return None
    few = config.model_copy(
        update={"ports": {name: config.ports[name] for name in changed if name in config.ports}}
    )
    queues = {**before.queues}
    for name, nic in nics.items():
        others = {port: queue for port, queue in before.queues[name].items() if port not in changed}
        if nic.settings.max is None:
            queues[name] = {**others, **_queues(nic, few, facts, others)}
        else:
            queues[name] = _queues(nic, config, facts)
            if any(queues[name].get(port) != queue for port, queue in others.items()) or any(
                port not in others and port not in changed for port in queues[name]
            ):
                return None

    ids = port_ids_again(changed, facts, before)
    decisions, shares = before.ports.copy(), before.shares.copy()
    was: dict[Resource, Value] = {}
    now: dict[Resource, Value] = {}
    for name in changed:
        was |= before.shares.get(name, {})
        if port := config.ports.get(name):
            switch = before.switches[port.switch]
            decided = _port(name, port, switch, before.nics, queues, ids[name], facts)
            decisions[name], shares[name] = decided.decision, decided.state
            now |= decided.state
        else:
            decisions.pop(name, None)
            shares.pop(name, None)
    for name, nic in nics.items():
        was |= _queue_cpus(nic, before.queues[name], facts)
        now |= _queue_cpus(nic, queues[name], facts)
    state = before.state.copy()
    for resource in was:
        del state[resource]
    state |= now
    refusals = (*_impossible(few, facts), *_no_hardware(few, nics, facts))
    again = replace(before, state=state, ports=decisions, refusals=refusals, queues=queues, shares=shares)
    return again, {*was, *now}


def _queue_cpus(nic: steering.Nic, queues: Mapping[str, Queue], facts: Facts) -> dict[Resource, Value]:
    """The CPUs that serve queues of a NIC."""
    cpus = {queue.cpu for queue in queues.values() if queue.cpu in facts.online_cpus}
    return {QueueCpu(*nic.at, cpu): RING_SIZE for cpu in cpus}


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


def _uplink(switch: Switch, nic: steering.Nic, config: Config, facts: Facts) -> dict[Resource, Value]:
    at, link, port_id = nic.at, nic.link, nic.member.port
    settings = config.nics[link.name]
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
    if not nic.generic:
        state[Feature(*at, MERGING)] = True
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


def _nic(switch: Switch, name: str, ids: Mapping[str, int], config: Config, facts: Facts) -> steering.Nic:
    """What is needed of a NIC to steer its ports' frames."""
    generic = config.nics[name].xdp_mode == "generic"
    return steering.Nic(
        link=facts.links[name],
        hardware=steering.usable(facts.hardware.get(name, Hardware()), python=switch.python, generic=generic),
        settings=config.nics[name].queues,
        own=facts.own_rules.get(name, frozenset()),
        member=MemberRow(ids[_uplink_name(name)], switch.number, "function"),
        digests=(facts.digest, facts.switch_digest),
        generic=generic,
    )


def _queues(
    nic: steering.Nic, config: Config, facts: Facts, beside: Mapping[str, Queue] | None = None
) -> dict[str, Queue]:
    """The queues of a NIC by port; ``beside`` are those of ports that are not in ``config``."""
    near = [cpu for cpu in nic.hardware.local_cpus if cpu in facts.online_cpus]
    others = [cpu for cpu in facts.online_cpus if cpu not in near]
    cpus = [cpu for cpu in nic.settings.cpus or () if cpu in facts.online_cpus]
    ports = {
        name: port
        for name, port in config.ports.items()
        if config.switches[port.switch].uplink == nic.link.name and _no_queue(name, port, facts) is None
    }
    return allocate(
        [
            Request(name, port.weight, port.cpu, _kind(nic, port))
            for name, port in sorted(ports.items(), key=lambda item: facts.ages.get(item[0], 0))
        ],
        {
            name: Queue(
                record.queue, facts.moved.get(name, record.cpu), steering.held_slot(nic, ports[name], port_id)
            )
            for name, (port_id, record) in facts.held.items()
            if record.queue and name in ports
        },
        cpus or [*near, *others],
        nic.settings.max,
        steering.slots(nic),
        beside,
    )


def _macs_of(nic: str, config: Config) -> list[str]:
    """The addresses of all ports of a NIC."""
    return [
        mac
        for port in config.ports.values()
        if config.switches[port.switch].uplink == nic
        for mac in port.mac
    ]


def _kind(nic: steering.Nic, port: PortConfig) -> Literal["auto", "hardware", "software"]:
    if port.queue == "auto" and steering.unfit(nic, port):
        return "software"
    return "auto" if port.queue == "off" else port.queue


def _no_hardware(config: Config, nics: Mapping[str, steering.Nic], facts: Facts) -> Iterable[OffloadError]:
    """Ports that ask for a hardware queue that no NIC of theirs can give."""
    for name, port in config.ports.items():
        nic = nics.get(config.switches[port.switch].uplink or "")
        if port.queue == "hardware" and nic and (why := steering.unfit(nic, port)):
            yield UnsupportedError(
                f"ports.{name}.queue: hardware: {nic.link.name} has none for it: {why}; or `queue: auto`"
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


def port_ids(config: Config, facts: Facts) -> dict[str, int]:
    """Rows of the port table by name: a port keeps its id; new ones get the lowest that nobody has."""
    names = [*config.ports]
    for name, switch in config.switches.items():
        names += [_uplink_name(switch.uplink)] if switch.uplink else []
        names += [_host_name(name)] if switch.host else []
    return _numbered(names, {name: port_id for name, (port_id, _) in facts.held.items()})


def port_ids_again(names: Collection[str], facts: Facts, before: Desired) -> dict[str, int]:
    """As ``port_ids``, for the ports ``names`` alone; no other row of ``before`` is given away."""
    known = {name: before.ports[name].port_id for name in names if name in before.ports}
    known |= {name: facts.held[name][0] for name in names if name in facts.held}
    if len(known) < len(names):
        others = {name: decision.port_id for name, decision in before.ports.items()}
        others |= {name: port_id for name, (port_id, _) in facts.held.items()}
        known = _numbered(names, others | known)
    return known


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
    steered: steering.Steered | None = None


def _port(
    name: str,
    port: PortConfig,
    switch: Switch | None,
    nics: Mapping[str, steering.Nic],
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
    delivery: Literal["frames", "tcp", "gro"] | None = None
    adapts = False
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
            if running and queue and queue.cpu is not None and queue.cpu not in facts.online_cpus:
                running, reason = False, f"CPU {queue.cpu}, which shall serve its queue, is offline"
        if running and queue:
            whole = _whole_frames(port, nics[nic or ""], queue)
            merges = 0 if whole else _merging(name, port, facts)
            reason = reason or (f"delivery: frames: {whole}" if port.delivery == "gro" and whole else None)
            delivery, adapts = _DELIVERIES[merges], port.delivery == "auto" and not whole
            flags |= RUNNING | merges | _frag_flags(present, nic, facts)
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
        reason = _why_bridge(port, switch, nics.get(nic or ""), no_queue, facts)
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
        delivery=delivery,
        adapts=adapts,
    )
    if nic is None or queue is None or queue.slot is None:
        return _Decided(decision, state)
    decision = replace(
        decision,
        queue_device=steering.device(nics[nic], queue),
        rx_queue=steering.rx_queue(nics[nic], port),
        queue_standing=bool(here) and steering.standing(nics[nic], port, queue),
    )
    return _Decided(decision, state, steering.Steered(port_id, port, queue, here))


_DELIVERIES: Mapping[int, Literal["frames", "tcp", "gro"]] = {0: "frames", GRO_TCP: "tcp", GRO: "gro"}


def _whole_frames(port: PortConfig, nic: steering.Nic, queue: Queue) -> str | None:
    """Why frames of a port cannot be merged before its device gets them; ``None``: they can."""
    if port.af_xdp:
        return "an AF_XDP socket takes frames as they come"
    if nic.generic:
        return f"{nic.link.name} has XDP in generic mode, for which the kernel leaves GRO out"
    if steering.device(nic, queue):
        return "a virtual function has no way from GRO past the bridge"
    return None


def _merging(name: str, port: PortConfig, facts: Facts) -> int:
    """The flag for which of a port's frames are merged, where they can be."""
    _, held = facts.held.get(name, (0, None))
    tcp = facts.merging.get(name, held is not None and bool(held.flags & GRO_TCP))
    return {"frames": 0, "gro": GRO, "auto": GRO_TCP if tcp else 0}[port.delivery]


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


def _why_bridge(
    port: PortConfig, switch: Switch | None, nic: steering.Nic | None, no_queue: str | None, facts: Facts
) -> str | None:
    """Why a port is not on the fast path; nothing where none could be asked for."""
    if no_queue:
        return no_queue
    if switch and switch.config.uplink is None and port.queue == "auto":
        return None
    if facts.detached:
        return "the fast path is detached: `offload apply FILE` puts it back"
    if switch is None or nic is None:
        return "its switch has no NIC that could sort frames"
    if port.queue == "hardware":
        why = steering.unfit(nic, port)
        return why or f"all {len(steering.slots(nic))} hardware queues of {nic.link.name} are taken"
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
    Functions,
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
    Fdb,
    BridgePort,
    AdminUp,
    Promiscuous,
    Address,
    LinkDns,
    Route,
    Carried,
    Uplink,
    QueueCpu,
    FunctionPort,
    IrqAffinity,
    NapiAffinity,
    Xps,
    NicSockets,
    PortSlot,
    Filter,
    NicAddress,
    Spread,
    SteeringRule,
    FunctionAddress,
)
"""In which order things are set. A device has its programs before it is in the bridge. The bridge knows where
an address is before it stops to flood what it does not know. Everything stands before the first filter sends
a frame there, and that before the NIC itself sorts frames there. A NIC has its virtual functions before its
program, whose attachment resets it. Things are unset in reverse."""

SETTINGS = (
    Master,
    AdminUp,
    Promiscuous,
    Feature,
    PeerFeature,
    Ipv6Disabled,
    Carried,
    Route,
    Functions,
    IrqAffinity,
    NapiAffinity,
    Xps,
    NicAddress,
    Spread,
    SteeringRule,
)
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
        before = observed.get(resource)
        if before == value:
            continue
        if isinstance(resource, Master) and before:
            unset.append(Change(resource, before, None))  # it leaves a switch before it is told of another
            before = None
        put.append(Change(resource, before, value))
    for resource, value in observed.items():
        if resource in desired or isinstance(resource, (BridgePort, BridgeVlans)):
            continue  # these go with the bridge
        after = originals.get(resource) if isinstance(resource, SETTINGS) else None
        if isinstance(resource, SETTINGS) and resource not in originals:
            continue
        if value != after:
            unset.append(Change(resource, value, after))
    carrying = {resource.ifindex for resource in (*observed, *desired) if isinstance(resource, Carried)}
    dividing = {change.resource.ifindex for change in put if isinstance(change.resource, Functions)}
    unset.sort(key=lambda change: (-_place(change, carrying, dividing), takeover.rank(change)))
    put.sort(key=lambda change: (_place(change, carrying, dividing), takeover.rank(change)))
    detached = {change.resource.ifindex for change in unset if isinstance(change.resource, Uplink)}
    idle = [
        change
        for change in unset
        if isinstance(change.resource, QueueCpu) and change.resource.ifindex not in detached
    ]
    stops = [stop for change in (*unset, *put) if (stop := _stop(change))]
    # A virtual function's program passes nothing on for another port than its own.
    stops.sort(key=lambda change: not isinstance(change.resource, FunctionAddress))
    # An address that moves between a NIC and its virtual function is at both for a moment, never at neither.
    taken = [change for change in put if isinstance(change.resource, NicAddress)]
    left = [change for change in unset if isinstance(change.resource, NicAddress)]
    unset = [_after_stop(change) for change in unset if change not in (*idle, *left)]
    put = [_after_stop(change) for change in put if change not in taken]
    steps = (*taken, *stops, *unset, *put, *left, *idle)
    return tuple(change for change in steps if change.before != change.after)


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
        if not (isinstance(resource, (BridgePort, BridgeVlans, Fdb)) and resource.ifindex in movers)
    }


def _place(change: Change, carrying: Collection[int], dividing: Collection[int]) -> float:
    """Where a change stands in the order of setting.

    Switching IPv6 off takes a device's addresses away, so it waits until these have moved. A NIC that is
    to have virtual functions is set up before that, for their driver asks it for their addresses.
    """
    resource = change.resource
    if isinstance(resource, (Ipv6Disabled, AdminUp)) and resource.ifindex in dividing:
        return _ORDER.index(Functions) - (0.2 if isinstance(resource, Ipv6Disabled) else 0.1)
    if isinstance(resource, Ipv6Disabled) and resource.ifindex in carrying:
        return len(_ORDER)
    return _ORDER.index(type(resource))


def _stop(change: Change) -> Change | None:
    """The step that sends a port's frames to the bridge, where it is not to run as it did.

    That comes before its filters go, so that frames on their way still find whose they are.
    """
    if isinstance(change.resource, FunctionAddress) and change.before and change.after:
        return replace(change, after=None)
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
    gone = (
        Uplink,
        QueueCpu,
        Filter,
        NicSockets,
        Feature,
        PeerFeature,
        Functions,
        FunctionPort,
        FunctionAddress,
        IrqAffinity,
        NapiAffinity,
        Xps,
        NicAddress,
        Spread,
        SteeringRule,
    )
    state: dict[Resource, Value] = {
        resource: value
        for resource, value in observed.items()
        if not isinstance(resource, gone) and not _of_function(resource, value)
    }
    for resource, value in state.items():
        if isinstance(resource, PortSlot) and isinstance(value, tuple):
            state[resource] = _stopped(PortRecord.of(value)).as_value()
        if isinstance(resource, Member) and isinstance(value, tuple):
            state[resource] = replace(MemberRow.of(value), bypass=False).as_value(str(value[-1]))
    return state


def _of_function(resource: Resource, value: Value) -> bool:
    """Whether this is a virtual function's place in a switch."""
    return (
        isinstance(resource, Member) and isinstance(value, tuple) and MemberRow.of(value).role == "function"
    )
