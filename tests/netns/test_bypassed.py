"""What the fast path passes by, with real nft chains, qdiscs and filters. Needs root and nft."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from offload.kernel import bypassed
from offload.kernel.bypassed import Place
from offload.kernel.netns import call_in
from tests.lab import Lab

MAC = "02:15:5d:00:00:01"
PORTS = {"web1": Place("web1", "ext0", "eth1"), "db1": Place("db1", "ext0", "eth1")}
DROP = "ip saddr 192.0.2.9 drop"
TBF = ["tbf", "rate", "1mbit", "burst", "10k", "latency", "10ms"]
U32 = ["u32", "match", "u32", "0", "0", "flowid", "1:1"]


def look(lab: Lab, ports: Mapping[str, Place] = PORTS) -> dict[str, list[str]]:
    """What each port passes by in the lab's host namespace; everything there can be read."""
    found = call_in(lab.host.path, lambda: bypassed.look(ports))
    assert found.unread == ()
    return {name: list(passed) for name, passed in found.ports.items()}


def nft(lab: Lab, table: str, chains: Mapping[str, str]) -> None:
    """Make a table of nft (family and name) with these chains, each given by its statements."""
    blocks = "\n".join(f"chain {name} {{\n{text}\n}}" for name, text in chains.items())
    done = subprocess.run(
        lab.host.argv("nft", "-f", "-"),
        input=f"table {table} {{\n{blocks}\n}}\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def hook(name: str, policy: str = "accept", device: str = "") -> str:
    return f"type filter hook {name} {device} priority 0; policy {policy};\n"


@pytest.fixture
def switched(lab: Lab) -> Lab:
    """A lab with a bridge ext0 that has eth1 and the devices web1 and db1."""
    lab.host.ip("link add ext0 type bridge")
    for device, mac in (("web1", MAC), ("db1", "02:15:5d:00:00:02")):
        lab.vm(device, mac=mac)
    for device in ("eth1", "web1", "db1"):
        lab.host.ip(f"link set {device} master ext0")
    return lab


def test_nothing_is_told_where_nothing_is(switched: Lab) -> None:
    assert look(switched) == {}
    assert call_in(switched.host.path, lambda: bypassed.warnings(PORTS)) == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param('iifname "web1" drop', {"web1"}, id="the-port"),
        pytest.param('oifname { "db1", "other" } drop', {"db1"}, id="a-set"),
        pytest.param("ether type arp drop", {"web1", "db1"}, id="any-interface"),
        pytest.param('iifname "eth1" drop', {"web1", "db1"}, id="the-uplink"),
        pytest.param('iifname "eth1" oifname "web1" drop', {"web1"}, id="uplink-to-one"),
        pytest.param('iifname "eth2" drop', set(), id="another-nic"),
        pytest.param('oifname "web*" drop', {"web1"}, id="wildcard"),
        pytest.param('iifname "web1" jump inner', {"web1"}, id="jump"),
        pytest.param('iifname vmap { "db1" : jump inner, "x" : drop }', {"db1"}, id="verdict-map"),
        pytest.param(f'iifname . ether saddr {{ "web1" . {MAC} }} drop', {"web1"}, id="concatenation"),
        pytest.param('iifname "web1" accept', set(), id="only-lets-pass"),
    ],
)
def test_rules_of_nft_concern_the_ports_they_name(switched: Lab, rule: str, expected: set[str]) -> None:
    nft(switched, "bridge guard", {"inner": "ether type arp drop", "forward": hook("forward") + rule})
    assert look(switched) == {
        name: ["the nft chain bridge guard forward"] for name in PORTS if name in expected
    }


def test_a_policy_that_drops_concerns_every_port(switched: Lab) -> None:
    nft(switched, "bridge guard", {"forward": hook("forward", policy="drop")})
    assert set(look(switched)) == {"web1", "db1"}


def test_a_python_bridge_has_no_bridge_rules_to_pass_by(switched: Lab) -> None:
    nft(switched, "bridge guard", {"forward": hook("forward", policy="drop")})
    assert look(switched, {"web1": Place("web1", None, "eth1")}) == {}


def test_chains_at_a_device_concern_its_port_and_those_at_the_uplink_all(switched: Lab) -> None:
    nft(
        switched,
        "netdev t",
        {
            "a": hook("ingress", device="devices = { web1, lo }") + DROP,
            "b": hook("egress", device="device web1") + DROP,
            "c": hook("ingress", device="device eth1") + DROP,
            "empty": hook("ingress", device="device db1"),
        },
    )
    assert look(switched) == {
        "web1": ["the nft chain netdev t a", "the nft chain netdev t b", "the nft chain netdev t c"],
        "db1": ["the nft chain netdev t c"],
    }


def test_filters_of_libvirt_are_told_by_their_chains(switched: Lab) -> None:
    jump = 'iifname "web1" jump libvirt-I-web1'
    nft(
        switched,
        "bridge nat",
        {"libvirt-I-web1": "ether type arp drop", "PREROUTING": hook("prerouting") + jump},
    )
    nft(switched, "ip filter", {"FI-db1": DROP})
    assert look(switched) == {
        "web1": ["the nft chain bridge nat PREROUTING", "libvirt's filter libvirt-I-web1"],
        "db1": ["libvirt's filter FI-db1"],
    }


def test_qdiscs_and_filters_that_are_not_the_kernels_own(switched: Lab) -> None:
    def tc(*arguments: str) -> None:
        switched.host.run("tc", *arguments)

    tc("qdisc", "add", "dev", "web1", "root", *TBF)
    tc("qdisc", "add", "dev", "db1", "root", "pfifo")
    tc("qdisc", "add", "dev", "web1", "ingress")
    tc("qdisc", "add", "dev", "eth1", "clsact")
    tc("filter", "add", "dev", "web1", "ingress", *U32)
    tc("filter", "add", "dev", "eth1", "ingress", *U32)
    tc("filter", "add", "dev", "eth1", "egress", *U32)
    uplink = "tc ingress filters (u32) of eth1"
    told = look(switched)
    assert sorted(told["web1"]) == sorted(
        ["the tc qdisc tbf of web1", "tc ingress filters (u32) of web1", uplink]
    )
    assert told["db1"] == [uplink]


@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_filters_beside_the_kernels_own_qdisc(switched: Lab, side: str) -> None:
    """A root that says nothing does not mean that there is nothing."""
    switched.host.run("tc", "qdisc", "add", "dev", "web1", "clsact")
    switched.host.run("tc", "filter", "add", "dev", "web1", side, *U32)
    assert look(switched)["web1"] == [f"tc {side} filters (u32) of web1"]


def test_the_warning_names_the_port_and_the_remedy(switched: Lab) -> None:
    switched.host.run("tc", "qdisc", "add", "dev", "web1", "root", *TBF)
    assert call_in(switched.host.path, lambda: bypassed.warnings(PORTS)) == [
        "port web1: frames on the fast path pass by the tc qdisc tbf of web1; "
        "`queue: off` on the port sends them through it again"
    ]


def test_a_thousand_ports_with_rules_are_looked_at_by_one_program(
    switched: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(Path(command[0]).name)
        return run(command, **options)

    ends = [f"vm{number}" for number in range(1000)]
    jumps = "".join(f'iifname "{end}" jump {end}\noifname "{end}" jump {end}\n' for end in ends)
    nft(
        switched,
        "bridge many",
        dict.fromkeys(ends, f"ether saddr != {MAC} drop") | {"forward": hook("forward") + jumps},
    )
    ports = {f"vm{number}": Place(f"vm{number}", "ext0", "eth1") for number in range(1100)}
    monkeypatch.setattr(subprocess, "run", counted)
    assert len(look(switched, ports)) == 1000
    assert started == ["nft"]
