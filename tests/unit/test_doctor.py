"""The doctor's findings, from answers that a kernel gave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.doctor import Finding, Probes, examine
from offload.errors import KernelError, PrivilegeError
from offload.kernel.bypassed import REMEDY, Found, Place
from offload.kernel.ethtool import Channels
from offload.kernel.host import Answer
from offload.kernel.managers import Manager
from offload.kernel.programs import Program
from offload.model import Link
from offload.paths import Paths

PATHS = Paths(pin_dir=Path("/sys/fs/bpf/one"))
ETH1 = Link(3, "eth1", None, "02:00:00:00:00:01", 1500, True, True, False, None, None, None, 4, 4)
LO = dataclasses.replace(ETH1, ifindex=1, name="lo")
BR0 = dataclasses.replace(ETH1, ifindex=9, name="br0", kind="bridge")
HEALTHY = Probes(
    host=lambda: {"btf": Answer("yes", "it is there")},
    driver=lambda name: "igb",
    capabilities=lambda link: {"native_xdp": Answer("yes", "its driver says so")},
    channels=lambda name: Channels(0, 0, 4, 0, 0, 8),
    peer_channels=lambda link: Channels(4, 4, 0, 4, 4, 0),
    program=lambda prog_id: Program(prog_id, "drop_all", ()),
    managers=lambda name, ifindex: [],
    bypassed=lambda ports: Found({}, ()),
)


def failing(error: Exception) -> Callable[..., Any]:
    def probe(*arguments: object) -> Any:
        raise error

    return probe


def nic_findings(link: Link = ETH1, own_bridges: tuple[str, ...] = (), **probes: Any) -> dict[str, Finding]:
    """The findings about one NIC by check, with some probes replaced."""
    links = {other.name: other for other in (LO, BR0, link)}
    report = examine(PATHS, links, dataclasses.replace(HEALTHY, **probes), [link.name], own_bridges)
    return {finding.check: finding for finding in report.findings if finding.subject == link.name}


def test_a_healthy_host_and_all_its_hardware() -> None:
    report = examine(PATHS, {"lo": LO, "br0": BR0, "eth1": ETH1}, HEALTHY)
    assert report.level == "ok"
    assert {finding.subject for finding in report.findings} == {"host", "eth1"}
    assert json.loads(json.dumps(dataclasses.asdict(report)))["findings"][0] == {
        "check": "btf",
        "level": "ok",
        "subject": "host",
        "message": "it is there",
        "remedy": "",
    }


@pytest.mark.parametrize(
    ("check", "answer", "level"),
    [
        ("bpffs", Answer("no", "none", "mount it"), "fail"),
        ("bridge_vlan_filtering", Answer("no", "none", "another kernel"), "warn"),
        ("bpffs", Answer("unknown", "not allowed", "run as root"), "warn"),
    ],
)
def test_host_levels(check: str, answer: Answer, level: str) -> None:
    report = examine(PATHS, {}, dataclasses.replace(HEALTHY, host=lambda: {check: answer}))
    (finding,) = report.findings
    assert (finding.level, finding.remedy, report.level) == (level, answer.remedy, level)
    assert answer.why in finding.message


def test_a_nic_that_is_not_there() -> None:
    (_, finding) = examine(PATHS, {"lo": LO}, HEALTHY, ["eth7"]).findings
    assert (finding.level, finding.subject, finding.message) == ("fail", "eth7", "there is no such device")


BRIDGED = dataclasses.replace(ETH1, master=9, master_name="br0")
ATTACHED = dataclasses.replace(ETH1, xdp_mode="native", xdp_prog_id=42)
VETH = dataclasses.replace(ETH1, kind="veth")


@pytest.mark.parametrize(
    ("check", "level", "told", "found"),
    [
        ("driver", "ok", "igb", nic_findings()),
        (
            "driver",
            "warn",
            "could not tell: eth1: gone",
            nic_findings(driver=failing(KernelError("eth1: gone"))),
        ),
        ("xdp_program", "ok", "no XDP program", nic_findings()),
        ("xdp_program", "fail", "42 is attached (native) and is not ours: drop_all", nic_findings(ATTACHED)),
        (
            "xdp_program",
            "fail",
            "pinned at /sys/fs/bpf/one-more/link",
            nic_findings(ATTACHED, program=lambda _: Program(42, "x", ("/sys/fs/bpf/one-more/link",))),
        ),
        (
            "xdp_program",
            "ok",
            "of this instance",
            nic_findings(ATTACHED, program=lambda _: Program(42, "x", ("/sys/fs/bpf/one/v1/link",))),
        ),
        (
            "xdp_program",
            "warn",
            "42 is attached (native); whose it is could not be told",
            nic_findings(ATTACHED, program=failing(PrivilegeError("needs CAP_SYS_ADMIN"))),
        ),
        ("master", "ok", "in no bridge", nic_findings()),
        ("master", "fail", "in the bridge br0, which is not ours", nic_findings(BRIDGED)),
        ("master", "ok", "which is ours", nic_findings(BRIDGED, own_bridges=("br0",))),
        ("manager", "ok", "nobody", nic_findings()),
        (
            "manager",
            "fail",
            "dhclient manages it (process 7)",
            nic_findings(managers=lambda *_: [Manager("dhclient", "process 7", "dhclient -r eth1")]),
        ),
        ("peer_queues", "ok", "4 RX queues here, 4 TX queues at the other end", nic_findings(VETH)),
        (
            "peer_queues",
            "fail",
            "no XDP program can be attached",
            nic_findings(VETH, peer_channels=lambda _: Channels(8, 8, 0, 8, 8, 0)),
        ),
    ],
)
def test_nic_findings(check: str, level: str, told: str, found: dict[str, Finding]) -> None:
    assert found[check].level == level
    assert told in found[check].message
    assert bool(found[check].remedy) == (level == "fail") or level == "warn"


@pytest.mark.parametrize(
    ("name", "answer", "level", "message", "remedy"),
    [
        pytest.param(
            *("native_xdp", Answer("yes", "its driver says so"), "ok"),
            *("native XDP: yes: its driver says so", ""),
            id="yes",
        ),
        pytest.param(
            *("native_xdp", Answer("no", "its driver has none", "generic"), "warn"),
            *("native XDP: no: its driver has none", "generic"),
            id="slower-without",
        ),
        pytest.param(
            *("vlan_in_frame", Answer("no", "it is fixed", "another NIC"), "fail"),
            *("VLAN tags in the frame: no: it is fixed", "another NIC"),
            id="needed",
        ),
        pytest.param(
            *("sriov", Answer("no", "none here", "the firmware"), "ok", "SR-IOV: no: none here", ""),
            id="not-needed",
        ),
        pytest.param(
            *("steering_rules", Answer("unknown", "only a trial tells", "--probe"), "warn"),
            *("steering rules by MAC: could not tell: only a trial tells", "--probe"),
            id="could-be-told",
        ),
        pytest.param(
            *("xdp_mtu", Answer("unknown", "only a program tells"), "ok"),
            *("native XDP with its MTU: could not tell: only a program tells", ""),
            id="cannot-be-told",
        ),
    ],
)
def test_capabilities_by_how_much_they_are_needed(
    name: str, answer: Answer, level: str, message: str, remedy: str
) -> None:
    found = nic_findings(capabilities=lambda link: {name: answer})[name]
    assert (found.level, found.message, found.remedy) == (level, message, remedy)


def test_only_a_veth_has_a_peer() -> None:
    assert "peer_queues" not in nic_findings()


PORTS = {"web1": Place("web1", "ext0", "eth1")}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(
            Found({"web1": ("the tc qdisc tbf of web1",)}, ()),
            ("warn", "port web1", "frames on the fast path pass by the tc qdisc tbf of web1", REMEDY),
            id="something",
        ),
        pytest.param(
            Found({}, ("nft is not installed",)),
            ("warn", "host", "could not tell what the fast path passes by: nft is not installed", ""),
            id="unreadable",
        ),
        pytest.param(
            Found({}, ()),
            ("ok", "host", "the fast path passes by no filter and no qdisc", ""),
            id="nothing",
        ),
    ],
)
def test_what_the_fast_path_passes_by_is_told(found: Found, expected: tuple[str, ...]) -> None:
    probes = dataclasses.replace(HEALTHY, bypassed=lambda ports: found)
    report = examine(PATHS, {"eth1": ETH1}, probes, ["eth1"], (), PORTS)
    (told,) = (finding for finding in report.findings if finding.check == "bypassed")
    assert (told.level, told.subject, told.message, told.remedy) == expected
