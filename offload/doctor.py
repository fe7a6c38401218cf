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
from offload.kernel import bypassed, host, managers, netdev, programs
from offload.kernel.bypassed import Found, Place
from offload.kernel.ethtool import Channels, Ethtool, Peers
from offload.kernel.host import Answer
from offload.kernel.links import Links
from offload.kernel.managers import Manager
from offload.kernel.netdev import XdpFeatures
from offload.kernel.programs import Program
from offload.model import Link
from offload.paths import Paths

Level = Literal["ok", "warn", "fail"]

TAG_STRIPPING = "rx-vlan-hw-parse"

# What offload can do without; everything else that is missing is a failure.
_OPTIONAL = frozenset({"bridge_vlan_filtering", "tcx", "cap_net_raw", "cap_sys_admin"})


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
    features: Callable[[str], Mapping[str, tuple[bool, bool]]]
    channels: Callable[[str], Channels]
    peer_channels: Callable[[Link], Channels]
    xdp_features: Callable[[str, int], XdpFeatures]
    program: Callable[[int], Program]
    managers: Callable[[str, int], Sequence[Manager]]
    bypassed: Callable[[Mapping[str, Place]], Found]


def diagnose(
    paths: Paths,
    nics: Sequence[str] | None = None,
    own_bridges: Sequence[str] = (),
    ports: Mapping[str, Place] | None = None,
) -> Report:
    """Examine this host with the real probes; arguments as for ``examine``."""
    with Links() as links, Ethtool() as ethtool:
        probes = Probes(
            host=partial(host.probe, paths.pin_dir),
            driver=ethtool.driver,
            features=ethtool.features,
            channels=ethtool.channels,
            peer_channels=partial(_peer_channels, Peers(links)),
            xdp_features=netdev.xdp_features,
            program=programs.describe,
            managers=managers.managers,
            bypassed=bypassed.look,
        )
        return examine(paths, links.snapshot(), probes, nics, own_bridges, ports or {})


def examine(
    paths: Paths,
    links: Mapping[str, Link],
    probes: Probes,
    nics: Sequence[str] | None = None,
    own_bridges: Sequence[str] = (),
    ports: Mapping[str, Place] = MappingProxyType({}),
) -> Report:
    """Return what is well and what is not.

    ``nics`` are the devices to look at; by default all that are hardware. ``own_bridges``
    are the bridges that this instance made: a NIC may be in one of those. ``ports`` are those that
    may take the fast path.
    """
    if nics is None:
        nics = sorted(link.name for link in links.values() if link.kind is None and link.name != "lo")
    findings = list(_host(probes))
    for name in nics:
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
    yield _ask("native_xdp", link, lambda: _native_xdp(link, probes.xdp_features(link.name, link.ifindex)))
    yield _ask("channels", link, lambda: _channels(link, probes.channels(link.name)))
    yield _ask("tag_stripping", link, lambda: _tag_stripping(link, probes.features(link.name)))
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


def _native_xdp(link: Link, features: XdpFeatures) -> Finding:
    if not features & XdpFeatures.BASIC or not features & XdpFeatures.REDIRECT:
        return Finding(
            "native_xdp",
            "warn",
            link.name,
            "the driver has no native XDP with redirection",
            f"set nics.{link.name}.xdp_mode: generic, which is slower, or use another NIC",
        )
    extras = {
        XdpFeatures.RX_SG: "frames longer than a page",
        XdpFeatures.XSK_ZEROCOPY: "AF_XDP zero copy",
    }
    told = [f"{text}: {'yes' if features & bit else 'no'}" for bit, text in extras.items()]
    return Finding("native_xdp", "ok", link.name, f"native XDP with redirection; {', '.join(told)}")


def _channels(link: Link, channels: Channels) -> Finding:
    most = channels.max_rx + channels.max_combined
    return Finding("channels", "ok", link.name, f"{channels.rx_queues} RX queues of at most {most}")


def _tag_stripping(link: Link, features: Mapping[str, tuple[bool, bool]]) -> Finding:
    active, fixed = features.get(TAG_STRIPPING, (False, True))
    # On a veth it is the sending end that keeps tags beside the frame; that end is set when it is taken.
    if not active or link.kind == "veth":
        return Finding("tag_stripping", "ok", link.name, "VLAN tags stay in the frame, where XDP sees them")
    if fixed:
        return Finding(
            "tag_stripping",
            "fail",
            link.name,
            f"{TAG_STRIPPING} is on and fixed: the NIC hides VLAN tags from XDP",
            "use another NIC, or see to it that no tagged frames reach this one",
        )
    message = f"{TAG_STRIPPING} is on; offload switches it off while it runs"
    return Finding("tag_stripping", "ok", link.name, message)


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
