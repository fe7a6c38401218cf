"""What this host and its NICs can do, and what to mend.

``examine`` turns what the probes found into findings. It changes nothing, and a
probe that fails becomes a finding that says so: a doctor who gives up at the first
symptom is no help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from offload.errors import OffloadError
from offload.kernel import bypassed, host, managers, nics, programs
from offload.kernel.bypassed import Found, Place
from offload.kernel.ethtool import Channels, Ethtool, Peers
from offload.kernel.host import Answer
from offload.kernel.links import Links
from offload.kernel.managers import Manager
from offload.kernel.programs import Program
from offload.model import Link
from offload.paths import Paths

Level = Literal["ok", "warn", "fail"]

# What offload can do without; everything else that is missing is a failure.
_OPTIONAL = frozenset({"bridge_vlan_filtering", "tcx", "cap_net_raw", "cap_sys_admin", "cap_sys_nice"})

TOPICS = {
    "native_xdp": "native XDP",
    "xdp_frags": "native XDP on frames longer than a page",
    "xdp_redirect_target": "a target of XDP's redirection",
    "zero_copy": "AF_XDP zero copy",
    "channels": "several RX queues",
    "rss_table": "RSS table",
    "rss_contexts": "RSS contexts",
    "steering_rules": "steering rules by MAC",
    "vlan_in_frame": "VLAN tags in the frame",
    "msix": "an interrupt for each queue (MSI-X)",
    "numa": "NUMA node",
    "mtu": "MTU limits",
    "xdp_mtu": "native XDP with its MTU",
    "sriov": "SR-IOV",
    "irq_affinity": "interrupts that can be moved",
    "irqs_stay": "interrupts that stay where they are put",
    "napi_threads": "NAPI threads",
    "napi_settings": "settings for each NAPI instance",
}
"""What a NIC's capabilities are called in a finding."""

# How bad it is that a NIC has not, or that nobody can tell. Otherwise: not at all, and a warning.
_LACKING: Mapping[str, tuple[Level, Level]] = {
    "native_xdp": ("warn", "warn"),
    "vlan_in_frame": ("fail", "warn"),
    "irq_affinity": ("warn", "ok"),
    "irqs_stay": ("warn", "ok"),
    # What only a program that is attached tells, or what native_xdp has said already.
    "xdp_frags": ("ok", "ok"),
    "xdp_redirect_target": ("ok", "ok"),
    "zero_copy": ("ok", "ok"),
    "xdp_mtu": ("ok", "ok"),
    "napi_settings": ("ok", "ok"),
    "mtu": ("ok", "ok"),
    "numa": ("ok", "ok"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``check`` is a stable name for programs, ``subject`` is ``host``, a NIC's name or ``port NAME``,
    ``remedy`` is empty where nothing needs to be done.
    """

    check: str
    level: Level
    subject: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, those about the host first."""

    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst level among the findings."""
        levels = {finding.level for finding in self.findings}
        return "fail" if "fail" in levels else "warn" if "warn" in levels else "ok"


@dataclass(frozen=True)
class Probes:
    """The questions that a doctor asks. Each raises an ``OffloadError`` where it cannot tell."""

    host: Callable[[], Mapping[str, Answer]]
    driver: Callable[[str], str]
    capabilities: Callable[[Link], Mapping[str, Answer]]
    channels: Callable[[str], Channels]
    peer_channels: Callable[[Link], Channels]
    program: Callable[[int], Program]
    managers: Callable[[str, int], Sequence[Manager]]
    bypassed: Callable[[Mapping[str, Place]], Found]


def diagnose(
    paths: Paths,
    devices: Sequence[str] | None = None,
    own_bridges: Sequence[str] = (),
    ports: Mapping[str, Place] | None = None,
    *,
    probe: bool = False,
) -> Report:
    """Examine this host with the real probes; arguments as for ``examine``.

    ``probe``: try what cannot be known otherwise, as ``nics.capabilities`` does.
    """
    with Links() as links, Ethtool() as ethtool:
        probes = Probes(
            host=partial(host.probe, paths.pin_dir),
            driver=ethtool.driver,
            capabilities=lambda nic: nics.capabilities(nic, ethtool, probe=probe),
            channels=ethtool.channels,
            peer_channels=partial(_peer_channels, Peers(links)),
            program=programs.describe,
            managers=managers.managers,
            bypassed=bypassed.look,
        )
        return examine(paths, links.snapshot(), probes, devices, own_bridges, ports or {})


def examine(
    paths: Paths,
    links: Mapping[str, Link],
    probes: Probes,
    devices: Sequence[str] | None = None,
    own_bridges: Sequence[str] = (),
    ports: Mapping[str, Place] = MappingProxyType({}),
) -> Report:
    """Return what is well and what is not.

    ``devices`` are the NICs to look at; by default all that are hardware. ``own_bridges``
    are the bridges that this instance made: a NIC may be in one of those. ``ports`` are those that
    may take the fast path.
    """
    if devices is None:
        devices = sorted(link.name for link in links.values() if link.kind is None and link.name != "lo")
    findings = list(_host(probes))
    for name in devices:
        if name in links:
            findings.extend(_nic(links[name], paths, links, probes, own_bridges))
        else:
            findings.append(Finding("device", "fail", name, "there is no such device", "see `ip link`"))
    findings.extend(_ports(probes.bypassed(ports), ports))
    return Report(tuple(findings))


def _ports(found: Found, ports: Mapping[str, Place]) -> Iterator[Finding]:
    for name, passed in found.ports.items():
        yield Finding("bypassed", "warn", f"port {name}", bypassed.words(passed), bypassed.REMEDY)
    for why in found.unread:
        yield Finding("bypassed", "warn", "host", f"could not tell what the fast path passes by: {why}")
    if ports and not found.ports and not found.unread:
        yield Finding("bypassed", "ok", "host", "the fast path passes by no filter and no qdisc")


def _peer_channels(peers: Peers, link: Link) -> Channels:
    peer = peers.find(link)
    with Ethtool(peer.netns) as ethtool:
        return ethtool.channels(peer.ifname)


def _host(probes: Probes) -> Iterator[Finding]:
    for check, answer in probes.host().items():
        match answer.state:
            case "yes":
                yield Finding(check, "ok", "host", answer.why)
            case "no":
                level: Level = "warn" if check in _OPTIONAL else "fail"
                yield Finding(check, level, "host", answer.why, answer.remedy)
            case "unknown":
                yield Finding(check, "warn", "host", f"could not tell: {answer.why}", answer.remedy)


def _nic(
    link: Link, paths: Paths, links: Mapping[str, Link], probes: Probes, own_bridges: Sequence[str]
) -> Iterator[Finding]:
    yield _ask("driver", link, lambda: _driver(link, probes.driver(link.name)))
    for name, answer in probes.capabilities(link).items():
        yield _capability(name, link, answer)
    yield _ask("xdp_program", link, lambda: _xdp_program(link, paths.pin_dir, probes))
    yield _master(link, links, own_bridges)
    yield from _managers(link, probes.managers(link.name, link.ifindex))
    if link.kind == "veth":
        yield _ask("peer_queues", link, lambda: _peer_queues(link, probes))


def _ask(check: str, link: Link, question: Callable[[], Finding]) -> Finding:
    try:
        return question()
    except OffloadError as error:
        return Finding(check, "warn", link.name, f"could not tell: {error}")


def _driver(link: Link, driver: str) -> Finding:
    return Finding("driver", "ok", link.name, f"driver {driver}")


def _capability(name: str, link: Link, answer: Answer) -> Finding:
    lacking, untold = _LACKING.get(name, ("ok", "warn"))
    level: Level = {"yes": "ok", "no": lacking, "unknown": untold}[answer.state]
    state = "could not tell" if answer.state == "unknown" else answer.state
    remedy = answer.remedy if level != "ok" else ""
    return Finding(name, level, link.name, f"{TOPICS[name]}: {state}: {answer.why}", remedy)


def _xdp_program(link: Link, pin_dir: Path, probes: Probes) -> Finding:
    if not link.xdp_prog_id:
        return Finding("xdp_program", "ok", link.name, "no XDP program is attached")
    told = f"XDP program {link.xdp_prog_id} is attached ({link.xdp_mode})"
    remedy = (
        f"`ip link set dev {link.name} xdp off` if it was attached by netlink; "
        "otherwise stop the process that holds its link, or remove the link's pin"
    )
    try:
        program = probes.program(link.xdp_prog_id)
    except OffloadError as error:
        message = f"{told}; whose it is could not be told: {error}"
        return Finding("xdp_program", "warn", link.name, message, remedy)
    if any(Path(pin).is_relative_to(pin_dir) for pin in program.pins):
        return Finding("xdp_program", "ok", link.name, f"{told}: {program.name}, of this instance")
    pins = f"pinned at {', '.join(program.pins)}" if program.pins else "pinned nowhere that we can see"
    message = f"{told} and is not ours: {program.name or 'without a name'}, {pins}"
    return Finding("xdp_program", "fail", link.name, message, remedy)


def _master(link: Link, links: Mapping[str, Link], own_bridges: Sequence[str]) -> Finding:
    if link.master_name is None:
        return Finding("master", "ok", link.name, "in no bridge and no bond")
    if link.master_name in own_bridges:
        return Finding("master", "ok", link.name, f"in the bridge {link.master_name}, which is ours")
    master = links.get(link.master_name)
    kind = (master and master.kind) or "device"
    return Finding(
        "master",
        "fail",
        link.name,
        f"in the {kind} {link.master_name}, which is not ours",
        f"ip link set dev {link.name} nomaster (this cuts off what uses {link.master_name})",
    )


def _managers(link: Link, found: Sequence[Manager]) -> Iterator[Finding]:
    if not found:
        yield Finding("manager", "ok", link.name, "nobody else manages it")
    for manager in found:
        message = f"{manager.name} manages it ({manager.evidence})"
        yield Finding("manager", "fail", link.name, message, manager.remedy)


def _peer_queues(link: Link, probes: Probes) -> Finding:
    # drivers/net/veth.c, veth_xdp_set(): "XDP expects number of rx queues not less than peer tx queues"
    rx_queues = probes.channels(link.name).rx_queues
    peer_tx_queues = probes.peer_channels(link).tx_queues
    told = f"{rx_queues} RX queues here, {peer_tx_queues} TX queues at the other end"
    if rx_queues >= peer_tx_queues:
        return Finding("peer_queues", "ok", link.name, told)
    remedy = f"`ethtool -L PEER tx {rx_queues}` at the other end, or more RX queues here"
    return Finding("peer_queues", "fail", link.name, f"{told}: no XDP program can be attached", remedy)
