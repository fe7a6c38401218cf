"""SR-IOV virtual functions of a NIC: making them, and what the NIC sorts into each.

A function that waits for a port has an address that nobody uses. Its driver takes that for its own when it
is loaded; what the NIC sorts into the function can be changed at any time, and the driver is not asked.

Sources: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci,
include/uapi/linux/if_link.h (IFLA_VF_…).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from ..errors import ForeignError, KernelError, UnsupportedError, VerifyError
from ..hardware import Function
from ..model import Link
from .failures import explained
from .links import Links
from .netns import call_in, identity
from .rtnl import RouteSocket, attributes, number, open_socket
from .sysfs import own_sysfs

_PCI = Path("/sys/bus/pci")
_PLACEHOLDER = "02:6f:66:"
"""The beginning of a waiting function's address: locally administered, and nobody's."""
_DEVICE_SECONDS = 15.0
"""The longest that a function's driver may take to have a network device; some 10 ms with igbvf."""
_FIRST_NETNS, _OUR_NETNS = "/proc/1/ns/net", "/proc/thread-self/ns/net"
_TRIES = 5
_RTEXT_FILTER_VF = 1  # of IFLA_EXT_MASK
_IFINFO_SIZE = 16
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED
_IFLA_VFINFO_LIST, _IFLA_VF_INFO, _IFLA_VF_MAC, _IFLA_VF_VLAN = 22, 1, 1, 2


def total(ifname: str) -> int:
    """How many virtual functions a NIC can have; 0 without SR-IOV."""
    return _count(ifname, "sriov_totalvfs")


def made(ifname: str) -> int:
    """How many virtual functions a NIC has now."""
    return _count(ifname, "sriov_numvfs")


def _count(ifname: str, file: str) -> int:
    with explained(ifname, f"read {file}"):
        address = _address(ifname)
        try:
            return int((_PCI / "devices" / address / file).read_text()) if address else 0
        except FileNotFoundError:
            return 0


def _address(ifname: str) -> str:
    """The PCI address of a device, empty where it has none."""
    try:
        with own_sysfs() as sys:
            name = os.path.basename(os.readlink(sys / "class/net" / ifname / "device"))
    except FileNotFoundError:
        return ""
    return name if (_PCI / "devices" / name).exists() else ""


def make(nic: Link, count: int) -> None:
    """Make virtual functions, each with a network device and an address that nobody uses. The NIC is up.

    Raises ForeignError where there are some already, UnsupportedError where the NIC or the function's driver
    cannot. Nothing is left behind then.
    """
    if there := made(nic.name):
        raise ForeignError(
            f"{nic.name} has {there} virtual functions that are not ours: "
            f"`echo 0 > /sys/class/net/{nic.name}/device/sriov_numvfs` removes them"
        )
    doing = f"make {count} virtual functions"
    if count > (most := total(nic.name)):
        raise UnsupportedError(f"{nic.name}: cannot {doing}: it can have {most} (sriov_totalvfs)")
    pci = _PCI / "devices" / _address(nic.name)
    try:
        with _as_it_was(nic.name, pci):
            with _no_driver_yet(nic.name, pci), explained(nic.name, doing, privilege="root"):
                (pci / "sriov_numvfs").write_text(str(count))
                for index in range(count):
                    _set(nic, index, _placeholder(nic, index), 0)
            for index in range(count):
                _start(nic, pci, index)
    except BaseException:
        with suppress(OSError):
            (pci / "sriov_numvfs").write_text("0")
        raise


@contextmanager
def _no_driver_yet(ifname: str, pci: Path) -> Iterator[None]:
    """Functions get no driver by themselves, which would take an address of its own choice.

    Afterwards drivers may take them, until the end of ``_as_it_was``.
    """
    file = pci / "sriov_drivers_autoprobe"
    with explained(ifname, "keep drivers from its virtual functions", privilege="root"):
        file.write_text("0")
    try:
        yield
    finally:
        with explained(ifname, "let drivers take its virtual functions", privilege="root"):
            file.write_text("1")


@contextmanager
def _as_it_was(ifname: str, pci: Path) -> Iterator[None]:
    """Whether functions get their drivers by themselves is the host's own affair in the end."""
    file = pci / "sriov_drivers_autoprobe"
    with explained(ifname, "read whether drivers take its virtual functions"):
        before = file.read_text()
    try:
        yield
    finally:
        with explained(ifname, "give sriov_drivers_autoprobe back", privilege="root"):
            file.write_text(before)


def _start(nic: Link, pci: Path, index: int) -> None:
    """Give a function to its driver, and wait for its network device.

    A driver that the NIC does not answer in time gives its device a random address, and no frames.
    """
    for _ in range(_TRIES):
        _load(nic, pci, index)
        device = _device(pci.name, index)
        if device and _own_mac(device) == _placeholder(nic, index):
            return
        with explained(nic.name, f"start its virtual function {index} again", privilege="root"):
            function = pci / f"virtfn{index}"
            (function / "driver/unbind").write_text(os.path.basename(os.path.realpath(function)))
    raise KernelError(f"{nic.name} does not answer the driver of its virtual function {index}: see `dmesg`")


def _own_mac(device: str) -> str:
    with own_sysfs() as sys:
        return (sys / "class/net" / device / "address").read_text().strip()


def _load(nic: Link, pci: Path, index: int) -> None:
    with explained(nic.name, f"start its virtual function {index}", privilege="root"):
        function = os.path.basename(os.path.realpath(pci / f"virtfn{index}"))
        (_PCI / "drivers_probe").write_text(function)
        end = time.monotonic() + _DEVICE_SECONDS
        while _device(pci.name, index) is None:
            if time.monotonic() > end:
                alias = (pci / f"virtfn{index}" / "modalias").read_text().strip()
                raise UnsupportedError(
                    f"{nic.name}: its virtual function {index} ({function}) has no network device: "
                    f"`modprobe {alias}` loads its driver; see `dmesg`"
                )
            _fetch(pci.name, index, f"{nic.name[:10]}v{index}")
            time.sleep(0.01)


def _fetch(pci: str, index: int, new_name: str) -> None:
    """Drivers make their devices in the first network namespace: bring one here, if we are elsewhere.

    It gets a name of the NIC's, as its own may be taken here.
    """
    if identity(_OUR_NETNS) == identity(_FIRST_NETNS):
        return
    name = call_in(_FIRST_NETNS, lambda: _device(pci, index))
    if name is None:
        return
    message = ifinfmsg()
    message["index"] = call_in(_FIRST_NETNS, lambda: socket.if_nametoindex(name))
    with open(_OUR_NETNS) as here, RouteSocket(open_socket(_FIRST_NETNS)) as route:
        message["attrs"] = [["IFLA_NET_NS_FD", here.fileno()], ["IFLA_IFNAME", new_name]]
        route.change(RTM_SETLINK, 0, message)


def unmake(ifname: str) -> None:
    """Remove all virtual functions of a NIC. One that has gone took them along."""
    with explained(ifname, "remove its virtual functions", privilege="root"):
        if address := _address(ifname):
            (_PCI / "devices" / address / "sriov_numvfs").write_text("0")


def functions(links: Links, nic: Link) -> tuple[Function, ...]:
    """The virtual functions of a NIC as read back, without their interrupts."""
    pci = _address(nic.name)
    found = []
    for index, (mac, vid) in sorted(_read(nic).items()):
        device = _device(pci, index)
        waits = mac.startswith(_PLACEHOLDER) or mac == "00:00:00:00:00:00"
        found.append(
            Function(index, "" if waits else mac, vid, device, links.ifindex(device) if device else None)
        )
    return tuple(found)


def set_address(nic: Link, index: int, mac: str | None, vid: int) -> None:
    """Let a NIC sort frames for a MAC in a VLAN (0: untagged) into a function; ``None``: nothing.

    Raises VerifyError when it does not read back.
    """
    with explained(nic.name, f"set the address of its virtual function {index}"):
        if mac is None:
            _set(nic, index, _placeholder(nic, index), None)
            _set(nic, index, None, 0)
        else:
            # In this order nothing of another VLAN is ever sorted there.
            _set(nic, index, None, vid)
            _set(nic, index, mac, None)
    wanted = (mac or _placeholder(nic, index), vid if mac else 0)
    if (is_now := _read(nic).get(index)) != wanted:
        raise VerifyError(f"{nic.name}: its virtual function {index} has {is_now}, not {wanted}")


def _placeholder(nic: Link, index: int) -> str:
    return f"{_PLACEHOLDER}{nic.mac[12:]}:{index:02x}"


def _set(nic: Link, index: int, mac: str | None, vid: int | None) -> None:
    attrs: list[list[object]] = []
    if mac is not None:
        attrs.append(["IFLA_VF_MAC", {"vf": index, "mac": mac}])
    if vid is not None:
        attrs.append(["IFLA_VF_VLAN", {"vf": index, "vlan": vid, "qos": 0}])
    message = ifinfmsg()
    message["index"] = nic.ifindex
    message["attrs"] = [["IFLA_VFINFO_LIST", {"attrs": [["IFLA_VF_INFO", {"attrs": attrs}]]}]]
    with RouteSocket(open_socket()) as route:
        route.change(RTM_SETLINK, 0, message)


def _read(nic: Link) -> dict[int, tuple[str, int]]:
    """MAC and VID by function."""
    message = ifinfmsg()
    message["index"] = nic.ifindex
    message["attrs"] = [["IFLA_EXT_MASK", _RTEXT_FILTER_VF]]
    with explained(nic.name, "read its virtual functions"), RouteSocket(open_socket()) as route:
        body = route.get(RTM_GETLINK, message)
    found = {}
    for kind, function in _each(attributes(body, _IFINFO_SIZE).get(_IFLA_VFINFO_LIST, b"")):
        if kind == _IFLA_VF_INFO:
            values = attributes(function)
            mac, vlan = values[_IFLA_VF_MAC], values[_IFLA_VF_VLAN]
            found[number(mac[:4])] = (mac[4:10].hex(":"), number(vlan[4:8]))
    return found


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Attributes in their order, of a type that repeats."""
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        yield kind & _ATTRIBUTE_TYPE, data[offset + _ATTRIBUTE.size : offset + length]
        offset += max(length + 3 & ~3, _ATTRIBUTE.size)


def _device(pci: str, index: int) -> str | None:
    """The network device of a function in this namespace."""
    with own_sysfs() as sys:
        try:
            [name] = os.listdir(sys / "bus/pci/devices" / pci / f"virtfn{index}" / "net")
        except (FileNotFoundError, ValueError):
            return None
    return name
