"""A network laboratory in namespaces: a multi-queue veth "NIC", a wire, VMs. Needs root.

::

    wire namespace          host namespace                      VM namespaces
    wire0 ================= eth1 (the NIC, N queues)
                            web1 (veth, the port's device) ==== eth0
                            tap1 (tap) ------------------------ Tap object of the test

Example::

    with Lab() as lab:
        vm = lab.vm("web1", mac="02:15:5d:00:00:01", address="192.0.2.11/24")
        with vm.ns.capture("eth0") as seen:
            lab.wire.send("wire0", [test_frame(vm.mac, WIRE_MAC, seq=1)])
            assert seen.wait_for(1) == [...]

Namespaces are entered with nsenter, never with ``ip netns exec``, which would mount a fresh
/sys and hide pins. /sys/class/net in them is therefore *not* theirs; /proc/sys/net is.
"""

from __future__ import annotations

import abc
import array
import atexit
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import platform
import re
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import pytest

from offload.closing import Closing
from offload.kernel.netns import call_in

PREFIX = "ofl"
WIRE_MAC = "02:aa:00:00:00:01"
NIC_MAC = "02:aa:00:00:00:02"
TEST_ETHERTYPE = 0x88B5  # IEEE 802 local experimental, so no protocol stack answers
TPID_8021Q = 0x8100
TPID_8021AD = 0x88A8
DEADLINE = 5.0
"""Seconds that a test waits for what must come."""
QUIET = 0.2
"""Seconds that a test watches for what must not come."""

# include/uapi/linux/if_packet.h, if_ether.h and if_tun.h, as far as Python's socket module lacks them
ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_AUXDATA = 8
PACKET_IGNORE_OUTGOING = 23
SO_RCVBUFFORCE = 33
TP_STATUS_VLAN_VALID = 1 << 4
TP_STATUS_VLAN_TPID_VALID = 1 << 6
AUXDATA = struct.Struct("=IIIHHHH")
TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_MULTI_QUEUE = 0x0100
BPF_PROG_TYPE_XDP = 6  # include/uapi/linux/bpf.h
XDP_FLAGS_SKB_MODE = 1 << 1  # include/uapi/linux/if_link.h
XDP_FLAGS_DRV_MODE = 1 << 2

T = TypeVar("T")
_serial = itertools.count()


class Lab(Closing):
    """Namespaces ``host`` and ``wire`` with the NIC pair between them; VMs and taps on request.

    ``queues`` is the number of RX and TX queues at both ends of the NIC. With ``ipv6`` off
    nothing in the lab sends a frame unless the test makes it. ``close()`` removes everything,
    may be called twice, and runs at interpreter exit too.
    """

    def __init__(self, queues: int = 4, nic: str = "eth1", ipv6: bool = False, mtu: int = 1500) -> None:
        remove_leftovers()
        self.nic = nic
        self.wire_end = "wire0"
        self.mtu = mtu
        self._ipv6 = ipv6
        self._id = f"{PREFIX}-{os.getpid()}-{next(_serial)}"
        self._owner = os.getpid()
        self._undo = contextlib.ExitStack()
        atexit.register(self.close)
        try:
            self.host = self.namespace("host")
            self.wire = self.namespace("wire")
            self.add_nic(self.nic, self.wire_end, queues=queues)
        except BaseException:
            self.close()
            raise

    def add_nic(
        self, nic: str, wire_end: str, number: int = 0, queues: int = 4, host: Namespace | None = None
    ) -> None:
        """A NIC and its wire. Its MACs are those of the first one with ``number`` in their fifth byte."""
        host = host or self.host
        ends = f"numrxqueues {queues} numtxqueues {queues}"
        near, far = (f"{mac[:12]}{number:02x}{mac[14:]}" for mac in (NIC_MAC, WIRE_MAC))
        host.ip(
            f"link add {nic} mtu {self.mtu} address {near} {ends} type veth "
            f"peer name {wire_end} mtu {self.mtu} address {far} {ends} netns {self.wire.name}"
        )
        # A tag must be in the bytes that XDP sees, and a checksum must be complete there.
        self.wire.run("ethtool", "-K", wire_end, "txvlan", "off", "tx-vlan-stag-hw-insert", "off")
        self.wire.run("ethtool", "-K", wire_end, "tx", "off", "tso", "off", "gso", "off")
        host.ip(f"link set {nic} up")
        self.wire.ip(f"link set {wire_end} up")

    def namespace(self, label: str) -> Namespace:
        """A namespace of this lab; its name is unique to the process."""
        name = f"{self._id}-{label}"
        _command("ip", "netns", "add", name)
        self._undo.callback(_command, "ip", "netns", "delete", name, check=False)
        ns = Namespace(name)
        ns.ip("link set lo up")
        for hook in ("iptables", "ip6tables", "arptables"):
            ns.sysctl(f"net.bridge.bridge-nf-call-{hook}", 0, missing_ok=True)
        if not self._ipv6:
            for scope in ("all", "default"):
                ns.sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 1, missing_ok=True)
        return ns

    def vm(
        self,
        device: str,
        mac: str,
        address: str | None = None,
        queues: int = 1,
        host: Namespace | None = None,
    ) -> Vm:
        """A VM namespace whose ``eth0`` has ``mac``; its other end is ``device`` in the host namespace.

        ``address`` is ``192.0.2.11/24`` or nothing. Both ends are up. The peer's GRO is left as
        the kernel makes it (off): switching it on is the product's work.
        """
        vm = Vm(device, mac, self.namespace(device))
        self.plug(vm, address, queues, host)
        return vm

    def plug(
        self, vm: Vm, address: str | None = None, queues: int = 1, host: Namespace | None = None
    ) -> None:
        """Make the VM's veth pair; also again, after ``unplug``."""
        host = host or self.host
        ends = f"numrxqueues {queues} numtxqueues {queues}"
        host.ip(
            f"link add {vm.device} mtu {self.mtu} {ends} type veth "
            f"peer name eth0 mtu {self.mtu} address {vm.mac} {ends} netns {vm.ns.name}"
        )
        if address is not None:
            vm.ns.ip(f"address add {address} dev eth0")
        vm.ns.ip("link set eth0 up")
        host.ip(f"link set {vm.device} up")

    def unplug(self, vm: Vm) -> None:
        self.host.ip(f"link delete {vm.device}")

    def delete_namespace(self, ns: Namespace) -> None:
        """Take a namespace's name away; it goes when no process and no socket is in it."""
        _command("ip", "netns", "delete", ns.name)

    def tap(self, device: str, queues: int = 1, mtu: int | None = None) -> Tap:
        """A tap in the host namespace with ``queues`` open queues, held by the returned object."""
        tap = Tap(self.host, device, queues)
        self._undo.callback(tap.close)
        self.host.ip(f"link set {device} mtu {mtu or self.mtu} up")
        return tap

    def close(self) -> None:
        """Remove every namespace, and with them every device. Idempotent; ignored in a forked child."""
        if os.getpid() == self._owner:
            self._undo.close()
            atexit.unregister(self.close)


class TwoHosts(Lab):
    """A lab with a second host, ``other``. The wire is a learning switch with both NICs and ``client`` at it.

    ``client`` has ``eth0``. Both hosts call their NIC ``nic``.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            self.other = self.namespace("other")
            self.add_nic(self.nic, "wire1", number=1, host=self.other)
            self.client = self.namespace("client")
            self.wire.ip(f"link add client0 type veth peer name eth0 netns {self.client.name}")
            self.client.ip("link set eth0 up")
            self.wire.ip("link add fabric0 type bridge")
            self.wire.ip("link set fabric0 up")
            for device in (self.wire_end, "wire1", "client0"):
                self.wire.ip(f"link set {device} master fabric0 up")
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class Namespace:
    """A named network namespace. Everything here acts inside it and leaves the caller outside."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def argv(self, *argv: str) -> list[str]:
        """The command line that runs ``argv`` in here, for callers that start processes themselves."""
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with ``check`` a failure raises and shows its output."""
        return _command(*self.argv(*argv), check=check, timeout=timeout)

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command with pipes for its output. The caller ends it."""
        return subprocess.Popen(self.argv(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ip(self, arguments: str) -> str:
        """``ip ARGUMENTS`` in here; returns its output."""
        return _command("ip", "-n", self.name, *arguments.split()).stdout

    def call(self, func: Callable[[], T]) -> T:
        """``func()`` in a thread that is in here; sockets that it opens stay in here."""
        return call_in(self.path, func)

    def sysctl(self, key: str, value: int, missing_ok: bool = False) -> None:
        """Set a ``net.`` sysctl; dots in ``key`` separate its parts."""

        def write() -> None:
            with open("/proc/sys/" + key.replace(".", "/"), "w") as file:
                file.write(str(value))

        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self.call(write)

    def ifindex(self, device: str) -> int:
        return self.call(lambda: socket.if_nametoindex(device))

    def send(self, device: str, frames: Iterable[bytes]) -> int:
        """Send raw frames out of ``device`` in order; returns how many. A full queue is waited for."""

        def body() -> int:
            sent = 0
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
                sender.bind((device, 0))
                for frame in frames:
                    _send_one(sender, frame)
                    sent += 1
            return sent

        return self.call(body)

    def capture(self, device: str) -> Capture:
        """Collect what arrives on ``device`` from now on."""
        return Capture(self, device)


@dataclass(frozen=True)
class Vm:
    """A VM: ``device`` in the host namespace, ``eth0`` with ``mac`` in its own."""

    device: str
    mac: str
    ns: Namespace

    def capture(self) -> Capture:
        return self.ns.capture("eth0")

    def send(self, frames: Iterable[bytes]) -> int:
        return self.ns.send("eth0", frames)

    def announce(self, tags: bytes = b"") -> None:
        """Be heard on the port: a frame to the VM's own MAC, which reaches nobody."""
        self.send([test_frame(self.mac, self.mac, tags=tags)])


class _Collector(abc.ABC):
    """Frames in order of arrival. A subclass says how to read one, and which fds to wait on."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []

    @abc.abstractmethod
    def _fds(self) -> list[int]: ...

    @abc.abstractmethod
    def _read_ready(self) -> Iterator[bytes]: ...

    def frames(self) -> list[bytes]:
        """All frames so far."""
        self._frames.extend(self._read_ready())
        return list(self._frames)

    def take(self) -> list[bytes]:
        """The frames that came since the last time, each of them once."""
        found = self.frames()
        self._frames.clear()
        return found

    def forget(self) -> None:
        """Begin anew: what came so far was not."""
        self.frames()
        self._frames.clear()

    def matching(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        return [frame for frame in self.frames() if wanted(frame)]

    def wait_for(
        self, count: int, timeout: float = DEADLINE, wanted: Callable[[bytes], bool] = lambda frame: True
    ) -> list[bytes]:
        """All frames that are ``wanted``, as soon as there are ``count``; AssertionError at the deadline."""
        end = time.monotonic() + timeout
        while len(found := self.matching(wanted)) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise AssertionError(f"{self}: {len(found)} of {count} frames after {timeout} s: {found[:3]}")
            select.select(self._fds(), [], [], left)
        return found

    def extra(self, known: int, seconds: float = QUIET) -> list[bytes]:
        """Frames beyond the first ``known``; watches ``seconds`` for them, less when one comes."""
        end = time.monotonic() + seconds
        while len(found := self.frames()) <= known and (left := end - time.monotonic()) > 0:
            select.select(self._fds(), [], [], left)
        return found[known:]

    def assert_silent(self, seconds: float = QUIET) -> None:
        """Nothing has come and nothing comes for ``seconds``."""
        found = self.extra(0, seconds)
        assert not found, f"{self}: unexpected frames: {[frame.hex() for frame in found[:3]]}"


class Capture(_Collector, Closing):
    """Every frame that arrives on a device, before the protocol stack takes it.

    Outgoing frames are left out. A VLAN tag that the kernel moved to skb metadata is put back
    into the bytes, so that a frame reads here as it was on the wire. Nothing is lost up to
    120,000 short frames, each of which takes 4 KiB on Linux 6.1.
    """

    def __init__(self, ns: Namespace, device: str) -> None:
        super().__init__()
        self._name = f"{device} in {ns.name}"
        self._socket = ns.call(lambda: _packet_socket(device))

    def _fds(self) -> list[int]:
        return [self._socket.fileno()]

    def _read_ready(self) -> Iterator[bytes]:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(AUXDATA.size))
            except BlockingIOError:
                return
            yield _with_tag(data, ancillary)

    def close(self) -> None:
        self._socket.close()

    def __str__(self) -> str:
        return self._name


class Listener(Closing):
    """What comes to a namespace, on one device or on any, with the device's name.

    ``protocol`` is the EtherType of the frames to hear. Such a listener is a part of the protocol stack:
    it hears what the stack would get, after tc and bridges had their way, and no tags. Without a
    protocol it hears every frame that arrives, before all of those, and no outgoing one.
    """

    def __init__(self, ns: Namespace, protocol: int = ETH_P_ALL, device: str | None = None) -> None:
        self.of_stack = protocol != ETH_P_ALL
        self._socket = ns.call(lambda: _packet_socket(device, protocol))

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Device and bytes of every frame that waits, tags included."""
        while True:
            try:
                data, ancillary, _, address = self._socket.recvmsg(65536, socket.CMSG_SPACE(AUXDATA.size))
            except BlockingIOError:
                return
            yield address[0], _with_tag(data, ancillary)

    def close(self) -> None:
        self._socket.close()


class Tap(_Collector):
    """The VM's end of a tap: frames that the host sent to it, and a way to send.

    ``by_queue`` counts the frames per queue. The device goes when the object is closed.
    """

    def __init__(self, ns: Namespace, device: str, queues: int) -> None:
        super().__init__()
        self.device = device
        self.by_queue = [0] * queues
        flags = IFF_TAP | IFF_NO_PI | (IFF_MULTI_QUEUE if queues > 1 else 0)
        request = struct.pack("16sH22x", device.encode(), flags)
        self._queues: list[int] = []
        for _ in range(queues):
            self._queues.append(ns.call(lambda: _open_tap(request)))

    @property
    def fds(self) -> list[int]:
        """The open queues, for another process that is to be the VM."""
        return list(self._queues)

    def _fds(self) -> list[int]:
        return self._queues

    def _read_ready(self) -> Iterator[bytes]:
        for index, fd in enumerate(self._queues):
            while True:
                try:
                    frame = os.read(fd, 65536)
                except BlockingIOError:
                    break
                self.by_queue[index] += 1
                yield frame

    def send(self, frames: Iterable[bytes], queue: int = 0) -> None:
        for frame in frames:
            os.write(self._queues[queue], frame)

    def fileno(self) -> int:
        """For select: readable when the first queue has a frame."""
        return self._queues[0]

    def announce(self, mac: str, tags: bytes = b"") -> None:
        """Be heard as ``mac``: a frame to that very MAC, which reaches nobody."""
        self.send([test_frame(mac, mac, tags=tags)])

    def close(self) -> None:
        while self._queues:
            os.close(self._queues.pop())

    def __str__(self) -> str:
        return f"tap {self.device}"


class Stream:
    """A context manager that sends ``test_frame``s from ``src`` to ``dst``, numbered from 0, till ``stop``.

    ``rate`` is in frames per second, sent in bursts of 10 ms. ``cpu`` is the CPU that sends, and
    with veth the CPU on which the other end receives.
    """

    def __init__(
        self, ns: Namespace, device: str, dst: str, src: str = WIRE_MAC, rate: int = 4000, cpu: int = 0
    ) -> None:
        self._burst = max(1, rate // 100)
        self._frames = (dst, src)
        self._device = device
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._cpu = cpu
        self.sent = 0
        self._done = self._pool.submit(ns.call, self._run)

    def _run(self) -> None:
        os.sched_setaffinity(0, {self._cpu})
        dst, src = self._frames
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind((self._device, 0))
            while not self._ending.wait(0.01):
                for _ in range(self._burst):
                    _send_one(sender, test_frame(dst, src, self.sent))
                    self.sent += 1

    def stop(self) -> int:
        """End it, if it runs; returns how many frames were sent. Raises what sending raised."""
        self._ending.set()
        self._done.result()
        self._pool.shutdown()
        return self.sent

    def run_on(self, frames: int) -> None:
        """Return when this many frames more were sent."""
        goal = self.sent + frames
        wait_until(lambda: self._done.done() or self.sent >= goal, f"{frames} frames more are sent", 60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Session:
    """A context manager with a TCP session to a server that sends back what it gets, till ``stop``.

    ``blocks`` of 4 KiB went there and came back unchanged so far. One that takes a minute fails.
    """

    def __init__(self, client: Namespace, address: str, port: int) -> None:
        self.blocks = 0
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._connection = client.call(lambda: socket.create_connection((address, port), 60))
        self._done = self._pool.submit(self._run)

    def _run(self) -> None:
        with self._connection, self._connection.makefile("rb") as answers:
            while not self._ending.wait(0.005):
                block = struct.pack("!I", self.blocks) * 1024
                self._connection.sendall(block)
                assert answers.read(len(block)) == block
                self.blocks += 1

    def run_on(self, blocks: int = 20) -> None:
        """Return when this many blocks more went there and back."""
        goal = self.blocks + blocks
        wait_until(lambda: self._done.done() or self.blocks >= goal, "the session goes on", 60)
        if self._done.done():
            self._done.result()

    def stop(self) -> None:
        """End it, if it runs. Raises what went wrong in it."""
        self._ending.set()
        self._done.result()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
            return
        with contextlib.suppress(OSError):  # it may have failed before, and has nothing to add
            self._connection.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown()


AS_NOBODY = (
    # Nobody may read what is being tested, wherever the checkout lies; and nothing else.
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)
"""The beginning of a command line that runs without privileges."""

VERSION = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
"""Of the running kernel."""
HANDED_OVER_SINCE = (6, 4)
"""The first kernel that lets a process map the rings of a socket that another has bound."""
handed_over = pytest.mark.skipif(
    VERSION < HANDED_OVER_SINCE, reason="before Linux 6.4 no socket is handed over"
)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def tag(vid: int, pcp: int = 0, dei: int = 0, tpid: int = TPID_8021Q) -> bytes:
    """A VLAN tag of four bytes."""
    return struct.pack("!HH", tpid, pcp << 13 | dei << 12 | vid)


def test_frame(
    dst: str, src: str, seq: int = 0, tags: bytes = b"", size: int = 60, ethertype: int = TEST_ETHERTYPE
) -> bytes:
    """An Ethernet frame of ``size`` bytes (without tags and FCS) that carries ``seq``; see ``seq_of``."""
    payload = struct.pack("!4sQ", b"offl", seq).ljust(size - 14, b"\xa5")
    return mac_bytes(dst) + mac_bytes(src) + tags + struct.pack("!H", ethertype) + payload


test_frame.__test__ = False  # type: ignore[attr-defined]  # a builder, not a test to collect


def seq_of(frame: bytes) -> int | None:
    """The sequence number in a ``test_frame``, whatever tags it carries; None for other frames."""
    at = frame.find(b"offl", 14)
    return None if at < 0 else int(struct.unpack_from("!Q", frame, at + 4)[0])


def udp4(
    dst: str,
    src: str,
    dst_ip: str,
    src_ip: str,
    payload: bytes,
    dport: int = 9,
    sport: int = 9,
    tags: bytes = b"",
) -> bytes:
    """An Ethernet, IPv4 and UDP frame with correct checksums. Addresses as text, ports as numbers."""
    source, target = socket.inet_aton(src_ip), socket.inet_aton(dst_ip)
    length = 8 + len(payload)
    pseudo = source + target + struct.pack("!BBH", 0, 17, length)
    udp = struct.pack("!HHHH", sport, dport, length, 0) + payload
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp) or 0xFFFF) + udp[8:]
    ip = ip4_header(source, target, socket.IPPROTO_UDP, length)
    return mac_bytes(dst) + mac_bytes(src) + tags + b"\x08\x00" + ip + udp


def ip4_header(source: bytes, target: bytes, protocol: int, length: int) -> bytes:
    """An IPv4 header with its checksum, before ``length`` bytes of ``protocol``."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, protocol, 0, source, target)
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]


def wait_until(condition: Callable[[], bool], what: str, timeout: float = DEADLINE) -> None:
    """Poll until ``condition()``; AssertionError that says ``what`` at the deadline."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not after {timeout} s")
        time.sleep(0.01)


def xdp_pass(ns: Namespace, device: str, native: bool = True) -> int:
    """Attach a program that passes every frame; returns its id. It goes with the device."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    code = struct.pack("=BBhi", 0xB7, 0, 0, 2) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
    program = libbpf.bpf_prog_load(BPF_PROG_TYPE_XDP, b"lab_pass", b"GPL", code, ctypes.c_size_t(2), None)
    if program < 0:
        raise OSError(ctypes.get_errno(), "cannot load an XDP program")
    try:
        mode = XDP_FLAGS_DRV_MODE if native else XDP_FLAGS_SKB_MODE
        ifindex = ns.ifindex(device)
        result = ns.call(lambda: int(libbpf.bpf_xdp_attach(ifindex, program, mode, None)))
        if result != 0:
            raise OSError(-result, f"cannot attach XDP to {device}: {os.strerror(-result)}")
        with open(f"/proc/self/fdinfo/{program}") as info:
            return int(next(line.split()[1] for line in info if line.startswith("prog_id")))
    finally:
        os.close(program)


def missing_privilege() -> str | None:
    """Why no laboratory can be built here, as found by trying; None when one can."""
    name = f"{PREFIX}-{os.getpid()}-probe"
    added = _command("ip", "netns", "add", name, check=False)
    _command("ip", "netns", "delete", name, check=False)
    return None if added.returncode == 0 else f"no network namespaces: {added.stderr.strip()}"


def remove_leftovers() -> None:
    """Delete namespaces of labs whose process is gone."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/run/netns"):
            match = re.fullmatch(rf"{PREFIX}-(\d+)-.*", name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                _command("ip", "netns", "delete", name, check=False)


def _command(*argv: str, check: bool = True, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr}{done.stdout}")
    return done


def _send_one(sender: socket.socket, frame: bytes) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        try:
            sender.send(frame)
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS or time.monotonic() > end:
                raise
            select.select([], [sender], [], 0.01)


def _packet_socket(device: str | None, protocol: int = ETH_P_ALL) -> socket.socket:
    """Frames of one device, or of all in the namespace."""
    everywhere = socket.htons(protocol) if device is None else 0
    receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, everywhere)
    try:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
        receiver.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        receiver.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        if device is not None:
            receiver.bind((device, protocol))
    except BaseException:
        receiver.close()
        raise
    return receiver


def _with_tag(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    for level, kind, value in ancillary:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status, _, _, _, _, tci, tpid = AUXDATA.unpack_from(value)
            if status & TP_STATUS_VLAN_VALID:
                tpid = tpid if status & TP_STATUS_VLAN_TPID_VALID else TPID_8021Q
                return data[:12] + struct.pack("!HH", tpid, tci) + data[12:]
    return data


def _open_tap(request: bytes) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, request)
    except BaseException:
        os.close(fd)
        raise
    return fd


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    words = array.array("H", data + b"\0" * (len(data) % 2))
    words.byteswap()
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
