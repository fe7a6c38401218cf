"""TCP across switches: the ends, the flows between them, and a transfer that checks what arrives.

::

    ext0:  web1  web2  the wire  [ext0-host]        int0:  web3  int0-host

Checksums and segments are left to whoever sends, as a guest and a host have it: nothing is switched
off with ethtool but at the peer on the wire, which stands for a machine whose NIC has done its work.
"""

from __future__ import annotations

import json
import socket
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.lab import DEADLINE, Lab, Namespace

BLOCK = bytes(range(251)) * 4096
"""What is sent over and over; no power of two long, so that a shifted segment is found."""


@dataclass(frozen=True)
class End:
    """One end of flows. ``device`` is the host's device that leads to it."""

    ns: Namespace
    address: str
    device: str


FLOWS = {
    "VM to VM": ("web1", "web2"),
    "VM to wire": ("web1", "wire"),
    "wire to VM": ("wire", "web1"),
    "VM to host": ("web3", "host"),
    "host to VM": ("host", "web3"),
}
SHARED_FLOWS = {
    "VM to host on an adapter": ("web1", "sharing host"),
    "host on an adapter to VM": ("sharing host", "web1"),
    "host to wire": ("sharing host", "wire"),
    "wire to host": ("wire", "sharing host"),
}
"""Flows of a host that shares the adapter."""


def ends_of(lab: Lab) -> dict[str, End]:
    """Make the VMs and give the wire an address; the host's own interfaces are the switch's to make."""
    lab.wire.ip(f"address add 192.0.2.1/24 dev {lab.wire_end}")
    vms = {"web1": "192.0.2.11", "web2": "192.0.2.12", "web3": "198.51.100.11"}
    ends = {
        name: End(lab.vm(name, mac_of(name), f"{address}/24").ns, address, name)
        for name, address in vms.items()
    }
    ends["wire"] = End(lab.wire, "192.0.2.1", lab.nic)
    ends["host"] = End(lab.host, "198.51.100.1", "int0-host-sw")
    ends["sharing host"] = End(lab.host, "192.0.2.2", "ext0-host-sw")
    return ends


def mac_of(name: str) -> str:
    return f"02:15:5d:00:00:0{name[-1]}"


def config_of(
    lab: Lab, bridge: str, queue: str, shared: bool = False, vlan: int | None = None
) -> dict[str, Any]:
    """Both switches on one kind of bridge, all in one VLAN. ``shared``: the host shares the adapter."""

    def interface(name: str, address: str) -> dict[str, Any]:
        return {"interface": name, "addresses": [f"{address}/24"], "vlan": vlan}

    switches: dict[str, dict[str, Any]] = {
        "ext0": {"type": "external", "uplink": lab.nic, "bridge": bridge},
        "int0": {"type": "internal", "bridge": bridge, "host": interface("int0-host", "198.51.100.1")},
    }
    if shared:
        switches["ext0"]["host"] = interface("ext0-host", "192.0.2.2")
    ports: Mapping[str, Any] = {
        name: {"switch": switch, "device": name, "mac": mac_of(name), "queue": queue, "vlan": vlan}
        for name, switch in (("web1", "ext0"), ("web2", "ext0"), ("web3", "int0"))
    }
    return {"version": 1, "metrics": None, "nics": {lab.nic: {}}, "switches": switches, "ports": ports}


def plain_bridges(lab: Lab) -> None:
    """What there would be without us: two kernel bridges, the host's address on one of them."""
    for bridge, devices in (("br0", (lab.nic, "web1", "web2")), ("br1", ("web3",))):
        lab.host.ip(f"link add {bridge} type bridge")
        for device in devices:
            lab.host.ip(f"link set {device} master {bridge}")
        lab.host.ip(f"link set {bridge} up")
    lab.host.ip("address add 198.51.100.1/24 dev br1")


def transfer(source: End, sink: End, blocks: int, verify: bool = True) -> float:
    """Send ``BLOCK`` so many times; returns the seconds from the first byte to the last one's arrival.

    AssertionError if what arrives is not what was sent; ``verify`` off looks at its length alone.
    """
    with sink.ns.call(lambda: socket.create_server((sink.address, 0))) as server:
        server.settimeout(DEADLINE)
        port = server.getsockname()[1]
        with ThreadPoolExecutor(max_workers=1) as pool:
            arriving = pool.submit(_receive, server, verify)
            with source.ns.call(lambda: socket.create_connection((sink.address, port), DEADLINE)) as client:
                start = time.monotonic()
                for _ in range(blocks):
                    client.sendall(BLOCK)
                client.shutdown(socket.SHUT_WR)
                length, seen = arriving.result()
                seconds = time.monotonic() - start
    assert length == blocks * len(BLOCK)
    assert not verify or seen == zlib.crc32(BLOCK * blocks)
    return seconds


def _receive(server: socket.socket, verify: bool) -> tuple[int, int]:
    """Length and CRC of what one client sends; 0 for the CRC that nobody wants."""
    connection, _ = server.accept()
    length = seen = 0
    room = memoryview(bytearray(1 << 20))
    with connection:
        connection.settimeout(DEADLINE)
        while size := connection.recv_into(room):
            length += size
            seen = zlib.crc32(room[:size], seen) if verify else 0
    return length, seen


def sent_to(lab: Lab, end: End) -> tuple[int, int]:
    """Packets and bytes that the host sent to an end. A packet is what a driver gets."""
    (link,) = json.loads(lab.host.ip(f"-json -statistics link show {end.device}"))
    return link["stats64"]["tx"]["packets"], link["stats64"]["tx"]["bytes"]
