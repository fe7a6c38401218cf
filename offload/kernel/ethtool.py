"""Offload features and channels of devices, and of the other ends of veth pairs.

The SIOCETHTOOL ioctls are used: unlike ethtool's generic netlink they need no family look-up, and
a socket carries its network namespace along. Source: include/uapi/linux/ethtool.h. Everything is
in host byte order. Features go by the kernel's names (``ethtool -k`` shows some under others).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from offload.closing import Closing
from offload.errors import KernelError, OffloadError, UnsupportedError, VerifyError
from offload.kernel.failures import explained
from offload.kernel.links import NO_NETNSID, Links
from offload.kernel.netns import call_in, identity
from offload.model import Link

PEER_GRO = "rx-gro"
"""On at the other end: then a veth takes frames that XDP redirects into it."""
PEER_TAG_INSERTION = ("tx-vlan-hw-insert", "tx-vlan-stag-hw-insert")
"""Off at the other end: then a tag that the VM sends is in the bytes, where programs look for it."""

Features = Mapping[str, tuple[bool, bool]]
"""By name whether a feature is active, and whether it is fixed."""

_SIOCETHTOOL = 0x8946  # include/uapi/linux/sockios.h
_SIOCGIFNAME = 0x8910
_GDRVINFO = 0x03
_GSTRINGS = 0x1B
_GSSET_INFO = 0x37
_GFEATURES = 0x3A
_SFEATURES = 0x3B
_GCHANNELS = 0x3C
_SCHANNELS = 0x3D
_SS_FEATURES = 4

_IFREQ = struct.Struct("=16sQ16x")  # name, pointer to the command's data
_IFREQ_INDEX = struct.Struct("=16si20x")
_STRING = 32  # ETH_GSTRING_LEN
_DRVINFO = struct.Struct("=I32s64x32s64x")  # cmd, driver, bus address
_SSET_INFO = struct.Struct("=IIQI")  # cmd, reserved, mask of sets, length of the one set asked for
_STRINGS = struct.Struct("=III")  # cmd, set, count
_FEATURES = struct.Struct("=II")  # cmd, number of blocks
_FEATURE_BLOCK = struct.Struct("=IIII")  # available, requested, active, never_changed
_FEATURE_SET = struct.Struct("=II")  # valid, requested
_CHANNELS = struct.Struct("=9I")  # cmd, max rx/tx/other/combined, rx/tx/other/combined
_BITS = 32  # features per block


@dataclass(frozen=True)
class Channels:
    """Queues that a device really uses now, which is what XDP counts, and the most it can have.

    ``other`` are interrupt vectors for other things than queues.
    """

    rx: int
    tx: int
    combined: int
    max_rx: int
    max_tx: int
    max_combined: int
    other: int = 0
    max_other: int = 0

    @property
    def rx_queues(self) -> int:
        return self.rx + self.combined

    @property
    def tx_queues(self) -> int:
        return self.tx + self.combined


class Ethtool(Closing):
    """Settings of the devices in the current network namespace, or in the one behind ``netns``.

    A context manager; ``close()`` is idempotent. Methods raise PrivilegeError, UnsupportedError or
    KernelError that name the device.
    """

    def __init__(self, netns: str | None = None) -> None:
        if netns is None:
            self._socket = _open_socket()
        else:
            with explained(netns, "enter the network namespace", privilege="CAP_SYS_ADMIN"):
                self._socket = call_in(netns, _open_socket)

    def features(self, ifname: str) -> Features:
        """Features by name as (active, fixed); a fixed one cannot be changed on this device."""
        with explained(ifname, "read its features"):
            return _features(self._read_features(ifname, _feature_names()))

    def set_feature(self, ifname: str, feature: str, on: bool) -> None:
        """Switch a feature; UnsupportedError when the device does not have it as asked afterwards."""
        doing = f"switch {feature} {'on' if on else 'off'}"
        with explained(ifname, doing):
            names = _feature_names()
            if feature not in names:
                raise OSError(errno.EOPNOTSUPP, "no such feature in this kernel")
            at = names.index(feature)
            blocks = [(0, 0)] * _blocks(names)
            bit = 1 << at % _BITS
            blocks[at // _BITS] = bit, bit if on else 0
            head = _FEATURES.pack(_SFEATURES, len(blocks))
            self.run(ifname, head + b"".join(_FEATURE_SET.pack(*block) for block in blocks))
        active, fixed = self.features(ifname)[feature]
        if active is not on:
            why = "it is fixed" if fixed else "another setting of the device forbids it"
            raise UnsupportedError(f"{ifname}: cannot {doing}: {why} (see `ethtool -k {ifname}`)")

    def driver(self, ifname: str) -> str:
        """The driver's name, as ``veth`` or ``ice``."""
        return self._driver_info(ifname)[0]

    def bus_address(self, ifname: str) -> str:
        """Where the hardware is, as ``0000:3b:00.0`` on PCI; software devices have none, or just a word."""
        return self._driver_info(ifname)[1]

    def _driver_info(self, ifname: str) -> tuple[str, str]:
        with explained(ifname, "read its driver"):
            data = self.run(ifname, _DRVINFO.pack(_GDRVINFO, b"", b""))
        _, name, address = _DRVINFO.unpack(data)
        return _text(name), _text(address)

    def channels(self, ifname: str) -> Channels:
        with explained(ifname, "read its channels"):
            data = self.run(ifname, _CHANNELS.pack(_GCHANNELS, *[0] * 8))
        _, max_rx, max_tx, max_other, max_combined, rx, tx, other, combined = _CHANNELS.unpack(data)
        return Channels(rx, tx, combined, max_rx, max_tx, max_combined, other, max_other)

    def set_channels(
        self, ifname: str, *, combined: int | None = None, rx: int | None = None, tx: int | None = None
    ) -> None:
        """Set how many queues a device uses; ``None`` leaves that kind as it is.

        The kernel refuses a number that cuts off queues which its RSS table names, or AF_XDP sockets use.
        Raises VerifyError when the device has another number of queues afterwards.
        """
        asked = {"combined": combined, "rx": rx, "tx": tx}
        changes = {kind: number for kind, number in asked.items() if number is not None}
        wanted = replace(self.channels(ifname), **changes)
        doing = "set its channels to " + ", ".join(f"{kind} {number}" for kind, number in changes.items())
        most = wanted.max_rx, wanted.max_tx, wanted.max_other, wanted.max_combined
        counts = wanted.rx, wanted.tx, wanted.other, wanted.combined
        with explained(ifname, doing):
            self.run(ifname, _CHANNELS.pack(_SCHANNELS, *most, *counts))
        found = self.channels(ifname)
        if any(getattr(found, kind) != number for kind, number in changes.items()):
            raise VerifyError(f"{ifname}: cannot {doing}: afterwards it has {found}")

    def rx_queues(self, link: Link) -> int:
        """RX queues of a device that are in use."""
        try:
            return self.channels(link.name).rx_queues
        except UnsupportedError:
            return link.rx_queues  # its driver cannot change their number

    def name(self, ifindex: int) -> str:
        """The name of the device with this ifindex."""
        with explained(f"ifindex {ifindex}", "look up its name"):
            request = fcntl.ioctl(self._socket, _SIOCGIFNAME, _IFREQ_INDEX.pack(b"", ifindex))
        return _text(request[:16])

    def run(self, ifname: str, command: bytes) -> bytes:
        """Run a command of SIOCETHTOOL, a struct of ``linux/ethtool.h``; returns what the kernel made of it.

        ``command`` has room for all that the kernel writes. Raises OSError.
        """
        return _ethtool_ioctl(self._socket, ifname, command)

    def _read_features(self, ifname: str, names: tuple[str, ...]) -> bytes:
        blocks = _blocks(names)
        return self.run(ifname, _FEATURES.pack(_GFEATURES, blocks) + bytes(_FEATURE_BLOCK.size * blocks))

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Peer:
    """The other end of a veth: ``device`` is our end, ``ifname`` its name where it lives.

    ``netns`` is the path of its namespace, None for the one that we are in. The path may be that
    of a process, so look a peer up when you need it and do not keep it.
    """

    device: str
    ifname: str
    netns: str | None

    def features(self) -> Features:
        with self._ethtool() as ethtool:
            return ethtool.features(self.ifname)

    def set_feature(self, feature: str, on: bool) -> None:
        """As ``Ethtool.set_feature``; the error also names our end and the command for the VM's side."""
        try:
            with self._ethtool() as ethtool:
                ethtool.set_feature(self.ifname, feature, on)
        except OffloadError as error:
            command = f"ethtool -K {self.ifname} {feature} {'on' if on else 'off'}"
            raise type(error)(f"{self.device}: other end {error}; inside the VM: `{command}`") from error

    def _ethtool(self) -> Ethtool:
        return Ethtool(self.netns)


class Peers:
    """Finds the other ends of veth pairs, whichever namespace they live in.

    Needs CAP_SYS_ADMIN for ends in other namespaces. Namespaces are looked for under /run/netns
    and among the processes, and remembered by id.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._paths: dict[int, str] = {}

    def find(self, link: Link) -> Peer:
        """The other end of ``link``, ready to be read and set.

        Raises PrivilegeError or KernelError with the command to run inside the VM when the end
        cannot be reached.
        """
        far = self._links.peer(link)
        path = self._path(link)
        try:
            with Ethtool(path) as ethtool:
                name = ethtool.name(far.ifindex)
        except OffloadError as error:
            raise type(error)(f"{link.name}: {error}; {_by_hand(far.name)}") from error
        return Peer(link.name, name, path)

    def features(self, links: Iterable[Link]) -> dict[str, Features | OffloadError]:
        """Features of the other ends of many veths, by our end's name; of one out of reach the error.

        A namespace is entered once for all that are there.
        """
        there: defaultdict[int | None, list[Link]] = defaultdict(list)
        for link in links:
            there[link.peer_netnsid].append(link)
        found: dict[str, Features | OffloadError] = {}
        for group in there.values():
            with suppress(OffloadError), Ethtool(self._path(group[0])) as ethtool:
                for link in group:
                    if link.peer_ifindex is not None:
                        found[link.name] = ethtool.features(ethtool.name(link.peer_ifindex))
            for link in group:
                if link.name not in found:
                    found[link.name] = self._alone(link)
        return found

    def _alone(self, link: Link) -> Features | OffloadError:
        try:
            return self.find(link).features()
        except OffloadError as error:
            return error

    def napi_ready(self, link: Link) -> bool:
        """Whether a frame that XDP redirects into ``link`` gets to the other end.

        drivers/net/veth.c, veth_xdp_xmit(): the far end must be up and run NAPI, which it does
        with GRO on or with a native XDP program. Devices other than veth have no such condition.
        """
        if link.kind != "veth":
            return True
        far = self._links.peer(link)
        if not far.up:
            return False
        if far.xdp_mode in ("native", "several"):
            return True
        active, _ = self.find(link).features()[PEER_GRO]
        return active

    def _path(self, link: Link) -> str | None:
        """A path to the namespace of a veth's other end, ``None`` for the one that we are in."""
        wanted = link.peer_netnsid
        if wanted is None:
            return self._links.netns
        known = self._paths.get(wanted)
        if known is not None and self._id(known) == wanted:  # ids are recycled
            return known
        refused = self._scan()
        if wanted in self._paths:
            return self._paths[wanted]
        unseen = f" ({refused} of these could not be looked at: needs CAP_SYS_PTRACE)" if refused else ""
        far = self._links.peer(link).name
        raise KernelError(
            f"{link.name}: cannot find the network namespace of its other end {far}, neither in "
            f"/run/netns nor among the processes{unseen}; {_by_hand(far)}"
        )

    def _scan(self) -> int:
        """Look at every namespace once; returns how many this process may not look at."""
        self._paths.clear()
        refused = 0
        seen: set[tuple[int, int]] = set()
        for path in _namespace_paths():
            try:
                which = identity(path)
            except PermissionError:
                refused += 1
                continue
            except OSError:
                continue  # the process ended meanwhile
            if which not in seen:
                seen.add(which)
                self._paths[self._id(path)] = path
        return refused

    def _id(self, path: str) -> int:
        try:
            return self._links.netnsid(path)
        except OffloadError:
            return NO_NETNSID  # not a namespace any more


def _namespace_paths() -> Iterator[str]:
    """Files that stand for network namespaces; named ones first, as those stay."""
    for directory, form in (("/run/netns", "/run/netns/{}"), ("/proc", "/proc/{}/ns/net")):
        try:
            entries = os.listdir(directory)
        except FileNotFoundError:
            continue
        for entry in entries:
            if directory != "/proc" or entry.isdigit():
                yield form.format(entry)


def _by_hand(ifname: str) -> str:
    off = " ".join(f"{feature} off" for feature in PEER_TAG_INSERTION)
    return f"inside the VM's namespace, run: `ethtool -K {ifname} {PEER_GRO} on {off}`"


@functools.cache
def _feature_names() -> tuple[str, ...]:
    """Every feature of this kernel, by bit; a bit without a name is ``""``. The same for all devices."""
    with _open_socket() as sock:
        command = _SSET_INFO.pack(_GSSET_INFO, 0, 1 << _SS_FEATURES, 0)
        *_, count = _SSET_INFO.unpack(_ethtool_ioctl(sock, "lo", command))
        command = _STRINGS.pack(_GSTRINGS, _SS_FEATURES, count) + bytes(_STRING * count)
        data = _ethtool_ioctl(sock, "lo", command)
    starts = range(_STRINGS.size, _STRINGS.size + _STRING * count, _STRING)
    return tuple(_text(data[start : start + _STRING]) for start in starts)


@functools.lru_cache(maxsize=256)
def _features(data: bytes) -> Features:
    """What ``Ethtool.features`` tells, from the kernel's answer: the same for very many devices."""
    found = {}
    for at, name in enumerate(_feature_names()):
        available, _, active, never = _FEATURE_BLOCK.unpack_from(data, _block_offset(at))
        bit = 1 << at % _BITS
        if name:
            found[name] = bool(active & bit), not available & bit or bool(never & bit)
    return found


def _blocks(names: tuple[str, ...]) -> int:
    return -(-len(names) // _BITS)


def _block_offset(at: int) -> int:
    return _FEATURES.size + at // _BITS * _FEATURE_BLOCK.size


def _ethtool_ioctl(sock: socket.socket, ifname: str, command: bytes) -> bytes:
    """Run an ethtool command in a buffer that the kernel may change, and return the buffer."""
    buffer = ctypes.create_string_buffer(command, len(command))
    fcntl.ioctl(sock, _SIOCETHTOOL, _IFREQ.pack(ifname.encode(), ctypes.addressof(buffer)))
    return buffer.raw


def _open_socket() -> socket.socket:
    # Any socket takes device ioctls; this family is in every kernel.
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")
