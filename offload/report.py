"""What is so, as views: the decisions of ``plan`` beside the counters of the kernel. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from . import lifecycle, steering
from .bridge.state import BridgeState
from .config import Config, PortConfig, vid_ranges
from .kernel.host import Answer
from .model import Filter, Link, Resource, StationRow, StationState
from .plan import Desired, PortDecision
from .views import (
    AfXdp,
    CapabilityView,
    CounterPath,
    Counters,
    Counts,
    DefaultPath,
    ExtensionView,
    HardwareQueues,
    HostView,
    NetworkView,
    NicView,
    PortQueue,
    PortView,
    ProgramView,
    PythonBridgeView,
    QueueFilter,
    QueueView,
    StationView,
    SwitchView,
    Traffic,
)


@dataclass(frozen=True)
class HeardAddress:
    """Where an address of a port was heard last, and how often that was from the wire after the port."""

    state: StationState
    moves: int
    since: int = 0


@dataclass(frozen=True)
class ChannelReading:
    """An AF_XDP port. ``no_consumer``: frames that nobody took; ``lost``: that found no room in a socket."""

    shown: AfXdp
    no_consumer: int
    lost: int


@dataclass(frozen=True)
class Reading:
    """Counters of one moment.

    ``ports`` is indexed by port id and has the fields of ``struct port_counters``; ``ids`` are the port
    ids by the names of their rows, hosts and uplinks among them. ``nics`` has the fields of
    ``struct nic_counters``, by NIC. ``lost`` are frames that vanished on their way to the queue's CPU,
    by port id. ``programs`` is digest, tag and run time in seconds by NIC; ``filters`` their number.
    ``heard`` has a port's addresses by port id and MAC, ``moves`` how often they went to the wire in
    all, by port id. ``untagged`` is the VID of a bridge's untagged frames, by switch; ``host_addresses``
    are those that the host has now, by interface. ``bridges`` are the Python bridges, by switch, and
    ``channels`` what there is to know of AF_XDP ports, by port. ``functions`` are tallies of virtual
    functions, by device: group, stranger and passed, as in ``struct function_counters``.
    ``capabilities`` are answers about NICs by name, ``numa_nodes`` the nodes of those that are at one.
    """

    links: Mapping[str, Link] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    ports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    nics: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    lost: Mapping[int, int] = field(default_factory=dict)
    programs: Mapping[str, tuple[str, str, float | None]] = field(default_factory=dict)
    filters: Mapping[str, int] = field(default_factory=dict)
    drivers: Mapping[str, str] = field(default_factory=dict)
    heard: Mapping[int, Mapping[str, HeardAddress]] = field(default_factory=dict)
    moves: Mapping[int, int] = field(default_factory=dict)
    untagged: Mapping[str, int] = field(default_factory=dict)
    host_addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bridges: Mapping[str, PythonBridgeView] = field(default_factory=dict)
    channels: Mapping[str, ChannelReading] = field(default_factory=dict)
    functions: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    capabilities: Mapping[str, Mapping[str, Answer]] = field(default_factory=dict)
    numa_nodes: Mapping[str, int] = field(default_factory=dict)


def heard_addresses(
    stations: Mapping[tuple[int, str, int], StationRow],
) -> dict[int, dict[str, HeardAddress]]:
    """The addresses of each port id by MAC: what was heard last, in whichever VLAN.

    A station's ``moves`` counts both ways, so about half of them went to the wire.
    """
    found: dict[int, dict[str, HeardAddress]] = {}
    for (_, mac, _), row in stations.items():
        heard = HeardAddress(row.state, (row.moves + (row.state == "away")) // 2, row.since)
        addresses = found.setdefault(row.port, {})
        if known := addresses.get(mac):
            newer = heard if heard.since > known.since else known
            heard = replace(newer, moves=max(heard.moves, known.moves))
        addresses[mac] = heard
    return found


@dataclass(frozen=True)
class Views:
    """Everything that people and Prometheus are shown, from one reading."""

    nics: list[NicView]
    switches: list[SwitchView]
    ports: list[PortView]
    queues: list[QueueView]

    def counts(self) -> Counts:
        return Counts(
            nics=len(self.nics),
            switches=len(self.switches),
            ports=len(self.ports),
            ports_active=sum(port.state == "active" for port in self.ports),
            queues=sum(queue.id != 0 for queue in self.queues),
            queues_waiting=sum(nic.queues_waiting for nic in self.nics),
            filters=sum(nic.filters for nic in self.nics),
        )


def views(
    config: Config,
    desired: Desired,
    reading: Reading,
    sources: Mapping[str, Literal["keep", "run"]],
    since: Mapping[lifecycle.Key, datetime] | None = None,
) -> Views:
    """Put the views together. ``sources`` names the ports that come from files.

    ``since`` is when each queue came into its state.
    """
    standings = lifecycle.standings(desired)
    ports = [
        _port(name, port, config, desired.ports[name], standings, reading, sources.get(name, "config"))
        for name, port in config.ports.items()
    ]
    return Views(
        nics=[_nic(name, config, desired, reading) for name in config.nics],
        switches=[_switch(name, config, desired, reading) for name in config.switches],
        ports=ports,
        queues=[
            queue for nic in config.nics for queue in _queues(nic, desired, standings, reading, since or {})
        ],
    )


def _port(
    name: str,
    port: PortConfig,
    config: Config,
    decision: PortDecision,
    standings: Mapping[lifecycle.Key, lifecycle.Standing],
    reading: Reading,
    source: Literal["config", "keep", "run"],
) -> PortView:
    heard = reading.heard.get(decision.port_id, {})
    return PortView(
        name=name,
        switch=port.switch,
        device=None if port.af_xdp else port.device,
        mac=list(port.mac),
        vlan=None if port.vlan.vids == (0,) else str(port.vlan),
        weight=port.weight,
        source=source,
        state=decision.state,
        path=decision.path,
        queue_asked=port.queue,
        delivery_asked=port.delivery,
        delivery=decision.delivery,
        queue=_port_queue(decision, standings),
        af_xdp=channel.shown if (channel := reading.channels.get(name)) else None,
        reason=decision.reason,
        stations=[
            StationView(mac=mac, state=heard[mac].state, moves=heard[mac].moves)
            for mac in port.mac
            if mac in heard
        ],
        moves=reading.moves.get(decision.port_id, 0),
        counters=_port_counters(name, port, config.switches[port.switch].uplink, decision, reading),
    )


def _port_queue(
    decision: PortDecision, standings: Mapping[lifecycle.Key, lifecycle.Standing]
) -> PortQueue | None:
    if decision.nic is None or decision.queue is None:
        return None
    queue = standings[decision.nic, decision.queue.id]
    return PortQueue(id=decision.queue.id, kind=queue.kind, cpu=queue.cpu, state=queue.state)


def _sum(*tallies: Mapping[str, int]) -> Traffic:
    packets = octets = 0
    for tally in tallies:
        packets += tally["packets"]
        octets += tally["bytes"]
    return Traffic(packets=packets, bytes=octets)


_GUARDS = ("spoofed", "guard_dhcp", "guard_ra", "link_local", "host")
"""Fields of ``struct port_counters`` that are reasons of drops by themselves."""


def _switch_drops(counters: Mapping[str, Any]) -> dict[str, int]:
    """What the programs dropped of a port's frames, by reason."""
    places = ("vlan_nic", "vlan_queue", "vlan_bridge", "vlan_sent")
    return {"vlan": sum(counters[place] for place in places)} | {each: counters[each] for each in _GUARDS}


def _tx(counters: Mapping[str, Any], uplink: str | None) -> dict[CounterPath, Traffic]:
    """What a port sent. Without an uplink there is no way straight to the wire."""
    sent: dict[CounterPath, Traffic] = {"local": _sum(counters["tx_local"])}
    if uplink:
        sent["direct"] = _sum(counters["tx_direct"])
    return sent | {"bridge": _sum(counters["tx_bridge"])}


def _rx_by_tc(counters: Mapping[str, Any]) -> dict[CounterPath, Traffic]:
    return {"local": _sum(counters["local"]), "bridge": _sum(counters["bridged"])}


def _port_counters(
    name: str, port: PortConfig, uplink: str | None, decision: PortDecision, reading: Reading
) -> Counters:
    counters = reading.ports.get(decision.port_id)
    link = reading.links.get(port.device or "")
    rx: dict[CounterPath, Traffic] = {}
    tx: dict[CounterPath, Traffic] = {}
    drops: dict[str, int] = {}
    if counters:
        if uplink:
            way: CounterPath = "af_xdp" if port.af_xdp else "queue"
            rx[way] = _sum(counters["socket"], counters["direct"], counters["handed"])
            if not port.af_xdp:
                rx["gro"] = _sum(counters["merged"])
        rx |= _rx_by_tc(counters)
        tx = _tx(counters, uplink)
        drops = _switch_drops(counters) | {"ring_full": reading.lost.get(decision.port_id, 0)}
    if link:
        drops["device_full"] = link.tx_dropped
    if channel := reading.channels.get(name):
        drops["no_consumer"] = channel.no_consumer
        drops["ring_full"] = drops.get("ring_full", 0) + channel.lost
    return Counters(rx=rx, tx=tx, drops={reason: number for reason, number in drops.items() if number})


def _queues(
    nic: str,
    desired: Desired,
    standings: Mapping[lifecycle.Key, lifecycle.Standing],
    reading: Reading,
    since: Mapping[lifecycle.Key, datetime],
) -> Iterable[QueueView]:
    mine = [decision for decision in desired.ports.values() if decision.nic == nic]
    yield _default_queue(nic, mine, reading)
    for decision in sorted(mine, key=lambda decision: decision.queue.id if decision.queue else 0):
        queue, device = decision.queue, decision.queue_device
        if not queue:
            continue
        standing = standings[nic, queue.id]
        counters = reading.ports.get(decision.port_id)
        ways = [counters[way] for way in ("socket", "direct", "left", "queued")] if counters else []
        sorted_in = _sum(*ways)
        drops = {"ring_full": reading.lost.get(decision.port_id, 0)}
        if counters:
            drops["vlan"] = counters["vlan_nic"] + counters["vlan_queue"]
        function = {name: tally["packets"] for name, tally in reading.functions.get(device or "", {}).items()}
        if function:
            drops["stranger"] = function.pop("stranger")
        yield QueueView(
            nic=nic,
            id=queue.id,
            kind=queue.kind,
            state=standing.state,
            since=since.get((nic, queue.id)),
            cpu=queue.cpu,
            device=device,
            rx_queue=decision.rx_queue,
            standing=decision.queue_standing if queue.kind == "hardware" else None,
            vlan_by="nic" if device else "xdp",
            ports=[decision.name],
            filters=_filters(nic, desired.shares[decision.name]),
            packets=sorted_in.packets,
            bytes=sorted_in.bytes,
            drops=sum(drops.values()),
            drops_by_reason=drops,
            not_taken=function,
        )


def _default_queue(nic: str, mine: Iterable[PortDecision], reading: Reading) -> QueueView:
    reasons = reading.nics.get(nic, {})
    uplink = reading.ports.get(reading.ids.get(f"uplink:{nic}", -1))
    refused = {"vlan": _switch_drops(uplink)["vlan"]} if uplink else {}
    return QueueView(
        nic=nic,
        id=0,
        kind="default",
        state="running" if nic in reading.links else "undefined",
        cpu=None,
        ports=[decision.name for decision in mine if not decision.queue],
        filters=[],
        packets=sum(tally["packets"] for tally in reasons.values()),
        bytes=sum(tally["bytes"] for tally in reasons.values()),
        drops=sum(refused.values()),
        drops_by_reason=refused,
    )


def _filters(nic: str, share: Iterable[Resource]) -> list[QueueFilter]:
    """Those of a port at a NIC: of addresses that have been heard."""
    return [
        QueueFilter(mac=resource.mac, vlan=resource.vid)
        for resource in share
        if isinstance(resource, Filter) and resource.device == nic
    ]


def _nic(name: str, config: Config, desired: Desired, reading: Reading) -> NicView:
    link = reading.links.get(name)
    program = reading.programs.get(name)
    mode = link.xdp_mode if link and program else None
    uplink = desired.nics.get(name)
    return NicView(
        name=name,
        ifindex=link.ifindex if link else None,
        driver=reading.drivers.get(name),
        mode_asked=config.nics[name].xdp_mode,
        mode="native" if mode == "native" else "generic" if mode == "generic" else None,
        program=ProgramView(digest=program[0], tag=program[1], run_seconds=program[2]) if program else None,
        filters=reading.filters.get(name, 0),
        default_queue={reason: tally["packets"] for reason, tally in reading.nics.get(name, {}).items()},
        queues_waiting=sum(
            decision.nic == name and decision.wants_queue for decision in desired.ports.values()
        ),
        rx_dropped=link.rx_dropped if link else 0,
        numa_node=reading.numa_nodes.get(name),
        rx_queues=uplink.hardware.rx_queues if uplink else None,
        hardware_queues=_hardware_queues(uplink, desired) if uplink else None,
        capabilities={
            about: CapabilityView(state=answer.state, why=answer.why, remedy=answer.remedy)
            for about, answer in reading.capabilities.get(name, {}).items()
        },
        problems=list(desired.nic_problems.get(name, ())),
    )


def _hardware_queues(nic: steering.Nic, desired: Desired) -> HardwareQueues:
    mine = [decision.queue for decision in desired.ports.values() if decision.nic == nic.link.name]
    return HardwareQueues(
        how=nic.hardware.how,
        total=len(steering.slots(nic)),
        in_use=sum(queue is not None and queue.kind == "hardware" for queue in mine),
        why=nic.hardware.why or None,
    )


def _switch(name: str, config: Config, desired: Desired, reading: Reading) -> SwitchView:
    switch = config.switches[name]
    ports = [port_name for port_name, port in config.ports.items() if port.switch == name]
    bridge = reading.bridges.get(name)
    return SwitchView(
        name=name,
        type=switch.type,
        uplink=switch.uplink,
        bridge=switch.bridge,
        device=name if name in reading.links else None,
        host=switch.host.interface if switch.host else None,
        host_interface=_host(name, config, reading),
        ports=ports,
        networks=_networks(name, config),
        untagged_vid=reading.untagged.get(name) or None,
        default_path=_default_path(name, switch.uplink, ports, reading),
        python_bridge=bridge,
        problems=[
            *desired.nic_problems.get(switch.uplink or "", ()),
            *([f"Python bridge: {bridge.problem}"] if bridge and bridge.problem else []),
        ],
    )


def _host(name: str, config: Config, reading: Reading) -> HostView | None:
    switch = config.switches[name]
    if switch.host is None:
        return None
    link = reading.links.get(switch.host.interface)
    counters = reading.ports.get(reading.ids.get(f"host:{name}", -1))
    drops = _switch_drops(counters) if counters else {}
    return HostView(
        interface=switch.host.interface,
        present=link is not None,
        mac=link.mac if link else None,
        vlan=switch.host.vlan,
        addresses=list(reading.host_addresses.get(switch.host.interface, ())),
        counters=Counters(
            rx=_rx_by_tc(counters) if counters else {},
            tx=_tx(counters, switch.uplink) if counters else {},
            drops={reason: number for reason, number in drops.items() if number},
        ),
    )


def python_bridge(state: BridgeState) -> PythonBridgeView:
    """A Python bridge as it last wrote of itself."""
    drops = Counter(state.drops)
    for member in state.members:
        drops.update(member.drops)
    problem = state.config_error or ("" if state.bound else f"{state.inner} is not there")
    return PythonBridgeView(
        running=state.running,
        problem=problem or (None if state.running else "its process does not run, or is stuck"),
        frames=sum(member.rx_packets for member in state.members),
        drops=dict(drops),
        restarts=state.restarts.extension + state.restarts.config + state.restarts.other,
        stations=len(state.stations),
        extensions=[
            ExtensionView(
                name=extension.name,
                state=extension.state,
                reason=extension.reason or None,
                failures=extension.failures,
                drops=extension.drops,
                redirects=extension.redirects,
            )
            for extension in state.extensions
        ],
    )


def silent_bridge(problem: str) -> PythonBridgeView:
    """A Python bridge of which nothing is known but what is wrong."""
    return PythonBridgeView(
        running=False, problem=problem, frames=0, drops={}, restarts=0, stations=0, extensions=[]
    )


def _networks(name: str, config: Config) -> list[NetworkView]:
    """The VLANs of a switch with who takes part; those with the same members are one entry."""
    host = config.switches[name].host
    members: dict[int, list[str]] = {}
    for port_name, port in config.ports.items():
        if port.switch == name:
            for vid in port.vlan.vids:
                members.setdefault(vid, []).append(port_name)
    if host:
        members.setdefault(host.vlan or 0, [])
    alike: dict[tuple[bool, bool, tuple[str, ...]], list[int]] = {}
    for vid in sorted(members):
        takes_part = host is not None and vid == (host.vlan or 0)
        alike.setdefault((vid == 0, takes_part, tuple(members[vid])), []).append(vid)
    return [
        NetworkView(vlan=None if untagged else vid_ranges(vids), ports=list(ports), host=takes_part)
        for (untagged, takes_part, ports), vids in alike.items()
    ]


def _default_path(name: str, uplink: str | None, ports: Iterable[str], reading: Reading) -> DefaultPath:
    """What a switch's bridge got and gave."""
    rows = [
        counters
        for row in (*ports, f"host:{name}")
        if (counters := reading.ports.get(reading.ids.get(row, -1))) is not None
    ]
    wire = reading.ports.get(reading.ids.get(f"uplink:{uplink}", -1))
    return DefaultPath(
        from_ports=_sum(*(counters["tx_bridge"] for counters in rows)),
        from_wire=_sum(wire["tx_bridge"]) if wire else Traffic(packets=0, bytes=0),
        to_ports=_sum(*(counters["bridged"] for counters in rows)),
    )


def heard_elsewhere(views: Views) -> list[str]:
    """What people should know of addresses that ports have and that were heard from the wire."""
    uplinks = {switch.name: switch.uplink or "the wire" for switch in views.switches}
    told = []
    for port in views.ports:
        uplink = uplinks[port.switch]
        for station in port.stations:
            if station.state == "away":
                told.append(
                    f"{station.mac} of port {port.name} is heard from {uplink}: its VM has moved there, "
                    "or another machine has the same address"
                )
            elif station.moves:
                told.append(
                    f"{station.mac} of port {port.name} was also heard from {uplink}, "
                    f"{station.moves} time{'s' if station.moves > 1 else ''}: its VM was there meanwhile, "
                    "or another machine has the same address"
                )
    return told
