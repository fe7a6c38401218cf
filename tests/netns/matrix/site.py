"""The switches of ``cells.topology`` behind one running daemon, and who hears what on them. Needs root.

All VMs live in one namespace and all wires in another, so that one socket hears everything that
arrives in either. In the host's namespace sockets of the protocol stack listen: what comes there has
passed by every tc program and was wanted by no bridge.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from offload.closing import Closing
from tests.instance import Instance
from tests.lab import (
    DEADLINE,
    QUIET,
    TEST_ETHERTYPE,
    TPID_8021AD,
    TPID_8021Q,
    Lab,
    Listener,
    mac_bytes,
    seq_of,
    tag,
    test_frame,
    udp4,
    wait_until,
)
from tests.netns.matrix.cells import HOSTS_DEVICE, UNKNOWN, UPLINKS, Bridge, Sending, has_queue, mac_of
from tests.netns.matrix.oracle import End, Mode, Tag, Topology, who_gets

ETHERTYPES = (TEST_ETHERTYPE, 0x0800, 0x0806, TPID_8021Q, TPID_8021AD)
"""What the sent frames are to a protocol stack that finds any of their tags where it looks."""
SENDER, TARGET = "203.0.113.1", "203.0.113.2"
"""Addresses that nobody has, so that no protocol stack answers."""
BATCH = 100
"""Frames that are sent before it is waited for where they arrive."""

Heard = Counter[tuple[str, bytes]]
"""How often an end, or any other device of the host, got which bytes."""


class Site(Closing):
    """The laboratory, the daemon and the listeners. A context manager."""

    def __init__(self, topology: Topology, bridge: Bridge) -> None:
        self.topology = topology
        self._held = ExitStack()
        self._senders: dict[str, socket.socket] = {}
        self._serial = 0
        self._patience = DEADLINE
        self._hosts = {end.name for _, end in self.ends if end.role == "host"}
        try:
            self.lab = self._held.enter_context(Lab(nic="spare"))
            self.vms = self.lab.namespace("vms")
            self._build()
            self.instance = self._held.enter_context(Instance(self.lab.host, config_of(topology, bridge)))
            self.instance.start()
            self._all_speak()
            self._ears = [self._held.enter_context(ear) for ear in self._listeners()]
        except BaseException:
            self.close()
            raise

    @property
    def ends(self) -> Iterator[tuple[str, End]]:
        """Every end with its switch."""
        return ((switch, end) for switch, ends in self.topology.items() for end in ends)

    def _build(self) -> None:
        for number, (switch, end) in enumerate(self.ends):
            if end.role == "wire":
                self.lab.add_nic(UPLINKS[switch], end.name, number)
            elif end.role == "vm":
                mac = next(iter(end.macs))
                self.lab.host.ip(
                    f"link add {end.name} type veth peer name {end.name} address {mac} netns {self.vms.name}"
                )
                self.lab.host.ip(f"link set {end.name} up")
                self.vms.ip(f"link set {end.name} up")

    def _listeners(self) -> Iterator[Listener]:
        yield from (Listener(self.vms), Listener(self.lab.wire))
        yield from (Listener(self.lab.host, device=name) for name in self._hosts)
        yield from (Listener(self.lab.host, protocol) for protocol in ETHERTYPES)

    def _all_speak(self) -> None:
        """Every end sends to itself in each of its VIDs, so that the switches know where it is."""
        for end in (end for _, end in self.ends if end.heard):
            for mac in end.macs | end.behind:
                for vid in sorted(end.mode.vids):
                    tags = b"" if vid == end.mode.native else tag(vid)
                    self._socket(end.name).send(test_frame(mac, mac, tags=tags))

        served = {
            end.name
            for switch, end in self.ends
            if switch in UPLINKS and end.role == "vm" and end.heard and has_queue(end.name)
        }

        def known() -> bool:
            ports = self.instance.json("ports")
            return all(port["state"] == "active" for port in ports) and all(
                port["path"] == "queue" for port in ports if port["name"] in served
            )

        wait_until(known, "all ports are served", 30)

    def mac(self, name: str) -> str:
        """The address to reach an end by, or to send from on a wire; one that nobody has for other names."""
        found = next((end for _, end in self.ends if end.name == name), None)
        return mac_of(found) if found else UNKNOWN

    def counted(self) -> Counter[tuple[str, str, str]]:
        """Packets of every port by port, direction and path."""
        return Counter(
            {
                (port["name"], direction, path): tally["packets"]
                for port in self.instance.json("ports")
                for direction in ("rx", "tx")
                for path, tally in port["counters"][direction].items()
            }
        )

    def hosts_devices(self) -> list[str]:
        """Devices of the host that must not speak: all but NICs, the host's interfaces and the loopback."""
        shown = json.loads(self.lab.host.ip("-json link show"))
        loud = {*UPLINKS.values(), *self._hosts, self.lab.nic, "lo"}
        return [HOSTS_DEVICE + link["ifname"] for link in shown if link["ifname"] not in loud]

    def _socket(self, sender: str) -> socket.socket:
        if sender not in self._senders:
            role = next((end.role for _, end in self.ends if end.name == sender), "host")
            ns = {"vm": self.vms, "wire": self.lab.wire, "host": self.lab.host}[role]
            opened = ns.call(lambda: _sender(sender.removeprefix(HOSTS_DEVICE)))
            self._senders[sender] = self._held.enter_context(opened)
        return self._senders[sender]

    def _send(self, sender: str, octets: bytes) -> None:
        """Send, and take no offence if a device of the host refuses to."""
        with suppress(*([OSError] if sender.startswith(HOSTS_DEVICE) else [])):
            self._socket(sender).send(octets)

    def run(self, sendings: Iterable[Sending]) -> dict[Sending, tuple[Heard, Heard]]:
        """Send each once; says for each what should have been heard, and what was."""
        results: dict[Sending, tuple[Heard, Heard]] = {}
        unsent = list(dict.fromkeys(sendings))
        while unsent:
            batch, unsent = unsent[:BATCH], unsent[BATCH:]
            results |= self._run_batch(batch)
        return results

    def _run_batch(self, batch: Sequence[Sending]) -> dict[Sending, tuple[Heard, Heard]]:
        numbered = dict(enumerate(batch, self._serial + 1))
        self._serial += len(batch)
        due = {seq: self._due(sending, seq) for seq, sending in numbered.items()}
        heard: defaultdict[int, Heard] = defaultdict(Counter)
        for seq, sending in numbered.items():
            self._send(sending.sender, octets_of(sending, seq))
        end = time.monotonic() + self._patience
        while any(due[seq] - heard[seq] for seq in due) and time.monotonic() < end:
            self._listen(heard, 0.05)
        if any(due[seq] - heard[seq] for seq in due):
            self._patience = QUIET  # who waits long for every batch of a switch that is broken waits for ever
        end = time.monotonic() + QUIET
        while (left := end - time.monotonic()) > 0:
            self._listen(heard, left)
        return {sending: (due[seq], heard[seq]) for seq, sending in numbered.items()}

    def _due(self, sending: Sending, seq: int) -> Heard:
        got = who_gets(self.topology, sending.sender, sending.frame)
        return Counter((name, octets_of(sending, seq, tags)) for name, tags in got.items())

    def _listen(self, heard: Mapping[int, Heard], seconds: float) -> None:
        """Wait for a frame, and take all that came with it."""
        select.select(self._ears, [], [], seconds)
        for ear in self._ears:
            for device, octets in ear.read():
                seq = seq_of(octets)
                if seq and not (ear.of_stack and device in self._hosts):
                    heard[seq][HOSTS_DEVICE + device if ear.of_stack else device, octets] += 1

    def close(self) -> None:
        self._held.close()


def config_of(topology: Topology, bridge: Bridge) -> dict[str, Any]:
    """The daemon's config for these switches."""
    switches: dict[str, dict[str, Any]] = {}
    ports: dict[str, dict[str, Any]] = {}
    for switch, ends in topology.items():
        hosted = any(end.role == "host" for end in ends)
        kind = "external" if switch in UPLINKS else "internal" if hosted else "private"
        switches[switch] = {"type": kind, "bridge": bridge}
        for end in ends:
            vlan = {"vlan": _vlan(end.mode)} if end.mode.vids != {0} else {}
            mac = next(iter(end.macs), None)
            if end.role == "wire":
                switches[switch]["uplink"] = UPLINKS[switch]
            elif end.role == "host":
                switches[switch]["host"] = {"interface": end.name, "mac": mac, **vlan}
            else:
                queue = "auto" if has_queue(end.name) else "off"
                ports[end.name] = {
                    "switch": switch,
                    "device": end.name,
                    "mac": mac,
                    "queue": queue,
                    **vlan,
                    "allow": {"mac_spoofing": end.spoofing},
                }
    nics: dict[str, Any] = {nic: {} for switch, nic in UPLINKS.items() if switch in topology}
    return {"version": 1, "metrics": None, "nics": nics, "switches": switches, "ports": ports}


def _vlan(mode: Mode) -> object:
    if not mode.trunk:
        return mode.native
    return {"trunk": sorted(mode.trunk), **({"native": mode.native} if mode.native else {})}


def octets_of(sending: Sending, seq: int, tags: tuple[Tag, ...] | None = None) -> bytes:
    """The frame that carries ``seq``, with ``tags`` in place of its own where they are given."""
    frame = sending.frame
    shown = frame.tags if tags is None else tags
    between = b"".join(tag(each.vid, each.pcp, tpid=each.tpid) for each in shown)
    marked = test_frame(frame.dst, frame.src, seq)[14:]
    if sending.shape == "ipv4":
        return udp4(frame.dst, frame.src, TARGET, SENDER, marked, tags=between)
    if sending.shape == "arp":
        who = (mac_bytes(frame.src), socket.inet_aton(SENDER), bytes(6), socket.inet_aton(TARGET))
        request = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, *who)
        head = mac_bytes(frame.dst) + mac_bytes(frame.src) + between + b"\x08\x06"
        return head + request + marked[: 46 - len(request)]
    return test_frame(frame.dst, frame.src, seq, between)


def _sender(device: str) -> socket.socket:
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sender.bind((device, 0))
    except BaseException:
        sender.close()
        raise
    return sender
