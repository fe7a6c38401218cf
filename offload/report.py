"""What is so, as views: the decisions of ``plan`` beside the counters of the kernel. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .config import Config, PortConfig
from .model import Link
from .plan import Desired, PortDecision
from .views import (
    CounterPath,
    Counters,
    Counts,
    NicView,
    PortQueue,
    PortView,
    ProgramView,
    QueueFilter,
    QueueState,
    QueueView,
    SwitchView,
    Traffic,
)


@dataclass(frozen=True)
class Reading:
    """Counters of one moment.

    ``ports`` is indexed by port id and has the fields of ``struct port_counters``; ``nics`` those of
    ``struct nic_counters``, by NIC. ``lost`` are frames that vanished on their way to the
    queue's CPU, by port id. ``programs`` is tag and run time in seconds by NIC; ``filters`` their number.
    """

    links: Mapping[str, Link] = field(default_factory=dict)
    ports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    nics: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    lost: Mapping[int, int] = field(default_factory=dict)
    programs: Mapping[str, tuple[str, str, float | None]] = field(default_factory=dict)
    filters: Mapping[str, int] = field(default_factory=dict)
    drivers: Mapping[str, str] = field(default_factory=dict)


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
    detached: bool,
) -> Views:
    """Put the views together. ``sources`` names the ports that come from files."""
    ports = [
        _port(name, port, desired.ports[name], reading, sources.get(name, "config"))
        for name, port in config.ports.items()
    ]
    return Views(
        nics=[_nic(name, config, desired, reading) for name in config.nics],
        switches=[_switch(name, config, desired, reading) for name in config.switches],
        ports=ports,
        queues=[queue for nic in config.nics for queue in _queues(nic, config, desired, reading, detached)],
    )


def _port(
    name: str,
    port: PortConfig,
    decision: PortDecision,
    reading: Reading,
    source: Literal["config", "keep", "run"],
) -> PortView:
    queue = decision.queue
    return PortView(
        name=name,
        switch=port.switch,
        device=port.device,
        mac=list(port.mac),
        vlan=None if port.vlan.vids == (0,) else str(port.vlan),
        weight=port.weight,
        source=source,
        state=decision.state,
        path=decision.path,
        queue=PortQueue(id=queue.id, kind="software", cpu=queue.cpu, state=_queue_state(decision))
        if queue
        else None,
        af_xdp=None,
        reason=decision.reason,
        counters=_port_counters(port, decision, reading),
    )


def _queue_state(decision: PortDecision) -> QueueState:
    """Running while frames go through it; set while its device is away; paused while that is down."""
    match decision.state:
        case "active" if decision.path == "queue":
            return "running"
        case "active":
            return "allocated"
        case "waiting":
            return "set"
        case _:
            return "paused"


def _sum(*tallies: Mapping[str, int]) -> Traffic:
    return Traffic(
        packets=sum(tally["packets"] for tally in tallies), bytes=sum(tally["bytes"] for tally in tallies)
    )


def _vlan_drops(counters: Mapping[str, Any]) -> int:
    return int(counters["vlan_nic"] + counters["vlan_queue"] + counters["vlan_bridge"])


def _port_counters(port: PortConfig, decision: PortDecision, reading: Reading) -> Counters:
    counters = reading.ports.get(decision.port_id)
    link = reading.links.get(port.device or "")
    rx: dict[CounterPath, Traffic] = {}
    drops: dict[str, int] = {}
    if counters:
        rx = {"queue": _sum(counters["direct"], counters["handed"]), "bridge": _sum(counters["bridged"])}
        drops = {"vlan": _vlan_drops(counters), "ring_full": reading.lost.get(decision.port_id, 0)}
    tx: dict[CounterPath, Traffic] = {}
    if link:
        tx["bridge"] = Traffic(packets=link.rx_packets, bytes=link.rx_bytes)
        drops["device_full"] = link.tx_dropped
    return Counters(rx=rx, tx=tx, drops={reason: number for reason, number in drops.items() if number})


def _queues(
    nic: str, config: Config, desired: Desired, reading: Reading, detached: bool
) -> Iterable[QueueView]:
    mine = [decision for decision in desired.ports.values() if decision.nic == nic]
    reasons = reading.nics.get(nic, {})
    yield QueueView(
        nic=nic,
        id=0,
        kind="default",
        state="running" if nic in reading.links else "undefined",
        cpu=None,
        ports=[decision.name for decision in mine if not decision.queue],
        filters=[],
        packets=sum(tally["packets"] for tally in reasons.values()),
        bytes=sum(tally["bytes"] for tally in reasons.values()),
        drops=0,
    )
    for decision in sorted(mine, key=lambda decision: decision.queue.id if decision.queue else 0):
        if not decision.queue:
            continue
        port = config.ports[decision.name]
        counters = reading.ports.get(decision.port_id)
        sorted_in = _sum(counters["direct"], counters["queued"]) if counters else Traffic(packets=0, bytes=0)
        lost = reading.lost.get(decision.port_id, 0)
        yield QueueView(
            nic=nic,
            id=decision.queue.id,
            kind="software",
            state=_queue_state(decision),
            cpu=decision.queue.cpu,
            ports=[decision.name],
            filters=[]
            if detached
            else [QueueFilter(mac=mac, vlan=vid) for mac in port.mac for vid in port.vlan.vids],
            packets=sorted_in.packets,
            bytes=sorted_in.bytes,
            drops=lost + (counters["vlan_nic"] + counters["vlan_queue"] if counters else 0),
        )


def _nic(name: str, config: Config, desired: Desired, reading: Reading) -> NicView:
    link = reading.links.get(name)
    program = reading.programs.get(name)
    mode = link.xdp_mode if link and program else None
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
        problems=list(desired.nic_problems.get(name, ())),
    )


def _switch(name: str, config: Config, desired: Desired, reading: Reading) -> SwitchView:
    switch = config.switches[name]
    return SwitchView(
        name=name,
        type=switch.type,
        uplink=switch.uplink,
        bridge=switch.bridge,
        device=name if name in reading.links else None,
        host=switch.host.interface if switch.host else None,
        ports=[port_name for port_name, port in config.ports.items() if port.switch == name],
        problems=list(desired.nic_problems.get(switch.uplink or "", ())),
    )
