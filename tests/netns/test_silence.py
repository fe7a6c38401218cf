"""Networks that the host has no part in: it is neither heard there nor reached from there. Needs root.

The host does what it can: it has IPv6, and addresses on an interface elsewhere, on the switches' own
devices and on its ends of the VMs' ports, where IPv6 is switched on against the product's will. VMs
and wire are quiet by themselves. An internal switch shows that what is sent here would be answered.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.instance import Instance
from tests.lab import (
    DEADLINE,
    QUIET,
    Capture,
    Lab,
    Listener,
    Namespace,
    Vm,
    checksum,
    ip4_header,
    mac_bytes,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ETH_P_802_2, ETH_P_SLOW, ETH_P_LLDP = 0x0004, 0x8809, 0x88CC  # include/uapi/linux/if_ether.h
MACS = {
    name: f"02:15:5d:00:00:{number:02x}"
    for number, name in enumerate(("priv1", "priv2", "ext1", "ext2", "ext3", "int1"), 1)
}
SILENT = ("priv1", "priv2", "ext1", "ext2", "ext3")
ALLOWED = "ext3"
"""The port that may take part in link-local protocols."""
ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses of the host on an interface that has nothing to do with a switch."""
INTERNAL = ("198.51.100.1", "2001:db8:2::1")
"""Addresses of the host on the internal switch."""


@dataclass(frozen=True)
class Site:
    """``addresses``: those of the host that nobody may reach, and ``macs`` those of all of its devices."""

    lab: Lab
    instance: Instance
    vms: Mapping[str, Vm]
    devices: list[str]
    addresses: list[str]
    macs: list[str]


@pytest.fixture(scope="module", params=["kernel", "python"])
def site(request: pytest.FixtureRequest, privilege: None) -> Iterator[Site]:
    """Private, external without host, and internal. Scope: all tests, once for each bridge."""
    with Lab() as lab:
        for scope in ("all", "default"):
            lab.host.sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 0)
        elsewhere = lab.namespace("elsewhere")
        lab.host.ip(f"link add mgmt0 type veth peer name mgmt0 netns {elsewhere.name}")
        add_addresses(lab.host, "mgmt0", ELSEWHERE)
        lab.host.ip("link set mgmt0 up")
        vms = {name: lab.vm(name, mac) for name, mac in MACS.items()}
        for vm in vms.values():
            lab.host.sysctl(f"net.ipv6.conf.{vm.device}.disable_ipv6", 0)
        with Instance(lab.host, config_of(lab, request.param)) as instance:
            instance.start()
            for vm in vms.values():
                vm.announce()
                instance.wait_port(vm.device, state="active")
            links = json.loads(lab.host.ip("-json link show"))
            silent = [
                link["ifname"]
                for link in links
                if link["ifname"] not in ("lo", "mgmt0", lab.nic) and not link["ifname"].startswith("int")
            ]
            addresses = list(ELSEWHERE)
            for number, device in enumerate(silent, 1):
                lab.host.sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 0)
                addresses += add_addresses(
                    lab.host, device, (f"203.0.113.{number}", f"2001:db8:1::{number:x}")
                )
            yield Site(
                lab,
                instance,
                vms,
                silent,
                addresses,
                sorted({link["address"] for link in links if link["ifname"] != "lo"}),
            )


def config_of(lab: Lab, bridge: str) -> dict[str, Any]:
    host = {"interface": "int0-host", "addresses": [f"{INTERNAL[0]}/24", f"{INTERNAL[1]}/64"]}
    switches = {"priv": "priv0", "ext": "ext0", "int": "int0"}
    ports: dict[str, dict[str, Any]] = {
        name: {"switch": switches[name[:-1]], "device": name, "mac": mac} for name, mac in MACS.items()
    }
    ports[ALLOWED]["allow"] = {"link_local_protocols": True}
    return {
        "version": 1,
        "metrics": None,
        "nics": {lab.nic: {}},
        "switches": {
            "priv0": {"type": "private", "bridge": bridge},
            "ext0": {"type": "external", "bridge": bridge, "uplink": lab.nic},
            "int0": {"type": "internal", "bridge": bridge, "host": host},
        },
        "ports": ports,
    }


def add_addresses(ns: Namespace, device: str, addresses: tuple[str, str]) -> list[str]:
    """Give a device an IPv4 and an IPv6 address; returns those that the kernel took."""

    def taken(*address: str) -> bool:
        return ns.run("ip", "address", "add", *address, "dev", device, check=False).returncode == 0

    old, new = addresses
    return [*([old] if taken(f"{old}/24") else []), *([new] if taken(f"{new}/64", "nodad") else [])]


def test_nobody_is_heard(site: Site, long: bool) -> None:
    """With devices going down and up, and the host calling out on each of them."""
    with ExitStack() as stack:
        ears: dict[str, Capture] = {name: stack.enter_context(site.vms[name].capture()) for name in SILENT}
        ears["wire"] = stack.enter_context(site.lab.wire.capture(site.lab.wire_end))
        end = time.monotonic() + (60 if long else 5)
        while time.monotonic() < end:
            provoke(site)
        assert {name: ear.extra(0) for name, ear in ears.items() if ear.extra(0)} == {}


def provoke(site: Site) -> None:
    """Make the host want to say something on each device: MLD, DAD, solicitations, ARP, pings."""
    host = site.lab.host
    for device in (*site.devices, site.lab.nic):
        host.ip(f"link set {device} down")
        host.ip(f"link set {device} up")
    calls = [
        host.popen("ping", "-c", "1", "-W", "1", "-I", device, target)
        for device in site.devices
        for target in ("203.0.113.200", "224.0.0.1", "ff02::1")
    ]
    for device in site.devices:
        host.sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 1)
        host.sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 0)
    for call in calls:
        call.communicate(timeout=DEADLINE)


@pytest.mark.parametrize("name", SILENT)
def test_no_address_of_the_host_is_reached(site: Site, name: str) -> None:
    """ARP, ping and neighbour discovery, each address at each MAC: no answer, and the host heard none."""
    vm, host = site.vms[name], site.lab.host
    before = received(host)
    with vm.capture() as heard:
        vm.send(probes(vm.mac, site.addresses, site.macs))
        heard.assert_silent()
    assert received(host) == before
    assert vm.mac not in host.ip("neighbour show")


def test_the_same_is_answered_where_the_host_takes_part(site: Site) -> None:
    vm, host = site.vms["int1"], site.lab.host
    before = received(host)
    with vm.capture() as heard:
        vm.send(probes(vm.mac, INTERNAL, site.macs))

        def kinds() -> set[str]:
            return {kind for frame in heard.frames() if (kind := answer(frame))}

        wait_until(lambda: kinds() >= {"arp", "echo", "echo6", "neighbour"}, "the host answers")
    assert received(host) != before
    assert vm.mac in host.ip("neighbour show")


def received(host: Namespace) -> dict[str, str]:
    """What the host's IP stacks took in so far."""
    old = host.run("cat", "/proc/net/snmp").stdout
    names, values = (line.split() for line in old.splitlines() if line.startswith("Ip:"))
    new = dict(line.split() for line in host.run("cat", "/proc/net/snmp6").stdout.splitlines())
    return {"ip": dict(zip(names, values, strict=True))["InReceives"], "ip6": new["Ip6InReceives"]}


LINK_LOCAL = {
    "lldp": ("01:80:c2:00:00:0e", ETH_P_LLDP.to_bytes(2) + b"\x02\x07\x04\x02\x15\x5d\x00\x00\x01"),
    "lldp-nearest-customer": (
        "01:80:c2:00:00:00",
        ETH_P_LLDP.to_bytes(2) + b"\x02\x07\x04\x02\x15\x5d\x00\x00\x01",
    ),
    "lacp": ("01:80:c2:00:00:02", ETH_P_SLOW.to_bytes(2) + b"\x01\x01\x01\x14"),
    "bpdu": ("01:80:c2:00:00:00", (38).to_bytes(2) + b"\x42\x42\x03\x00\x00\x02\x02"),
    "802.1x": ("01:80:c2:00:00:03", b"\x88\x8e\x01\x01\x00\x00"),
}


@pytest.mark.parametrize("protocol", LINK_LOCAL)
@pytest.mark.parametrize("name", SILENT)
def test_link_local_protocols(site: Site, name: str, protocol: str) -> None:
    """Of a VM they reach the wire if they are allowed, and never the host's own daemons or other VMs."""
    destination, content = LINK_LOCAL[protocol]
    vm, others = site.vms[name], [site.vms[other] for other in SILENT if other not in (name, ALLOWED)]
    frame = (mac_bytes(destination) + mac_bytes(vm.mac) + content).ljust(60, b"\0")
    dropped = site.instance.port(name)["counters"]["drops"].get("link_local", 0)
    with ExitStack() as stack:
        wire = stack.enter_context(site.lab.wire.capture(site.lab.wire_end))
        ears = [stack.enter_context(other.capture()) for other in others]
        daemons = [
            stack.enter_context(Listener(site.lab.host, number))
            for number in (ETH_P_802_2, ETH_P_SLOW, ETH_P_LLDP, 0x888E)
        ]
        vm.send([frame])
        if name == ALLOWED:
            assert wire.wait_for(1) == [frame]
        time.sleep(QUIET)
        assert wire.frames() == ([frame] if name == ALLOWED else [])
        assert [ear.frames() for ear in ears] == [[]] * len(ears)
        assert [list(daemon.read()) for daemon in daemons] == [[]] * len(daemons)
    drops = site.instance.port(name)["counters"]["drops"].get("link_local", 0)
    assert drops - dropped == (name != ALLOWED)


# --- frames --------------------------------------------------------------------------------------

ARP = struct.Struct("!HHBBH6s4s6s4s")
ECHO_REQUEST, ECHO_REPLY = 8, 0
ECHO6_REQUEST, ECHO6_REPLY, SOLICITATION, ADVERTISEMENT = 128, 129, 135, 136


def probes(mac: str, addresses: Iterable[str], macs: Iterable[str]) -> Iterator[bytes]:
    """Questions to each address, to everybody and to each MAC, from a neighbour of that address."""
    for address in addresses:
        if ":" in address:
            yield from probes6(mac, address, macs)
        else:
            yield from probes4(mac, address, macs)


def probes4(mac: str, address: str, macs: Iterable[str]) -> Iterator[bytes]:
    source = socket.inet_aton(address)[:3] + b"\x63"
    target = socket.inet_aton(address)
    arp = ARP.pack(1, 0x0800, 6, 4, 1, mac_bytes(mac), source, bytes(6), target)
    echo = with_checksum(struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, 1, 1) + bytes(8))
    packet = ip4_header(source, target, socket.IPPROTO_ICMP, len(echo)) + echo
    for destination in ("ff:ff:ff:ff:ff:ff", *macs):
        yield ethernet(destination, mac, 0x0806, arp)
        yield ethernet(destination, mac, 0x0800, packet)


def probes6(mac: str, address: str, macs: Iterable[str]) -> Iterator[bytes]:
    target = socket.inet_pton(socket.AF_INET6, address)
    source = target[:8] + bytes(7) + b"\x63"
    solicited = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13] + target[13:]
    group = "33:33:" + solicited[12:].hex(":")
    solicitation = bytes([SOLICITATION, 0, 0, 0]) + bytes(4) + target + b"\x01\x01" + mac_bytes(mac)
    echo = struct.pack("!BBHHH", ECHO6_REQUEST, 0, 0, 1, 1)
    for destination in (group, *macs):
        yield ethernet(destination, mac, 0x86DD, icmp6(source, solicited, solicitation))
        yield ethernet(destination, mac, 0x86DD, icmp6(source, target, echo))


def icmp6(source: bytes, target: bytes, message: bytes) -> bytes:
    """An IPv6 packet. Hop limit 255, as neighbour discovery wants it (RFC 4861, 7.1.1)."""
    pseudo = source + target + struct.pack("!IxxxB", len(message), socket.IPPROTO_ICMPV6)
    summed = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    return struct.pack("!IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255) + source + target + summed


def with_checksum(message: bytes) -> bytes:
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def ethernet(destination: str, source: str, ethertype: int, content: bytes) -> bytes:
    header = mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", ethertype)
    return (header + content).ljust(60, b"\0")


def answer(frame: bytes) -> str | None:
    """Which answer to ``probes`` a frame is."""
    match frame[12:14]:
        case b"\x08\x06" if frame[21] == 2:
            return "arp"
        case b"\x08\x00" if frame[23] == socket.IPPROTO_ICMP and frame[34] == ECHO_REPLY:
            return "echo"
        case b"\x86\xdd" if frame[20] == socket.IPPROTO_ICMPV6:
            return {ECHO6_REPLY: "echo6", ADVERTISEMENT: "neighbour"}.get(frame[54])
    return None
