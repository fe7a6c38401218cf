"""What frames on the fast path pass by: packet filters and queueing disciplines of other people.

A frame that XDP or tc hands over never meets the bridge, nor what stands at the devices between. That is
only told, per port; nothing of it is touched. Each table is read once, however many ports there are:

* nft chains of the family ``bridge``, and chains of any family at the ingress or egress of a
  device: over netlink (include/uapi/linux/netfilter/nf_tables.h), and what rules match from
  ``nft --json``, which is started only where the bridge family has chains. ebtables is
  mostly nft underneath.
* the tables of the old ebtables, where their kernel modules are loaded.
* libvirt's network filters, by the names of their chains (src/nwfilter/nwfilter_ebiptables_driver.c).
* tc qdiscs and filters (include/uapi/linux/rtnetlink.h, pkt_sched.h, pkt_cls.h).
"""

from __future__ import annotations

import errno
import re
import shutil
import socket
import struct
import subprocess
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_GETQDISC, RTM_GETTFILTER
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from ..config import Config
from ..errors import KernelError, OffloadError
from ..rulesets import Table, of_ebtables, of_nft
from .failures import explained
from .rtnl import RouteSocket, attributes, open_socket, text

T = TypeVar("T")

_NETLINK_NETFILTER = 12
_GETCHAIN = 10 << 8 | 4  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_USE = 1, 3, 4, 5, 6
_HOOK_DEV, _HOOK_DEVS = 3, 4
_NFGENMSG = 4  # bytes
_POLICY_DROP = 0

_TCMSG = struct.Struct("=B3xiIII")  # family, ifindex, handle, parent, info
_KIND, _OPTIONS = 1, 2
_BPF_NAME = 7
_IFINFOMSG = 16  # bytes
_IFLA_QDISC = 6
_SIDES = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_…)
_WITHOUT_RULES = frozenset({"noqueue", "pfifo_fast", "pfifo", "bfifo", "fq", "fq_codel", "mq"})
"""Qdiscs that hold no frame back for longer than the device does, and drop none by a rule."""
_ALONE = (_WITHOUT_RULES - {"mq"}) | {"noop"}
"""Of these, those below which there are no others; a device that is down has noop."""
_FEW = 32
"""Devices that are asked about one by one; with more of them it takes less time to list everything."""
_OURS = "offload-"
"""How the names of our own tc programs begin."""

_TIMEOUT = 10.0
"""Seconds for a program to print its tables."""
REMEDY = "`queue: off` on the port sends them through it again"


class Place(NamedTuple):
    """Where a port is. ``bridge`` ``None``: no bridge of the kernel carries its default path."""

    device: str
    bridge: str | None
    uplink: str | None


@dataclass(frozen=True)
class Found:
    """What each port's frames pass by, in words, and what could not be read."""

    ports: Mapping[str, tuple[str, ...]]
    unread: tuple[str, ...]


@dataclass(frozen=True)
class _Chain:
    """A chain of nft. ``devices`` are those that it is hooked to, ``empty`` tells that it does nothing."""

    family: str
    table: str
    name: str
    devices: tuple[str, ...]
    empty: bool

    def __str__(self) -> str:
        return f"the nft chain {self.family} {self.table} {self.name}"


def places(config: Config, ports: Collection[str] | None = None) -> dict[str, Place]:
    """Those of ``ports``, ``None``: of all in ``config``, that may take the fast path."""
    found = {}
    for name, port in config.ports.items():
        if ports is not None and name not in ports:
            continue
        switch = config.switches[port.switch]
        if port.device and port.queue != "off":
            bridge = port.switch if switch.bridge == "kernel" else None
            found[name] = Place(port.device, bridge, switch.uplink)
    return found


def warnings(ports: Mapping[str, Place]) -> list[str]:
    """One for each port whose frames pass something by, and one for each thing that could not be read."""
    found = look(ports)
    told = [f"port {name}: {words(passed)}; {REMEDY}" for name, passed in found.ports.items()]
    return [*told, *(f"what the fast path passes by is not known in full: {why}" for why in found.unread)]


def words(passed: Sequence[str]) -> str:
    """Tell people what a port's frames pass by."""
    return f"frames on the fast path pass by {', '.join(passed)}"


def look(ports: Mapping[str, Place]) -> Found:
    """Look at everything. Raises nothing: what fails is told in ``unread``."""
    unread: list[str] = []
    chains = _try(_chains, unread) or []
    bridged = any(chain.family == "bridge" for chain in chains)
    tables = (_try(_nft_tables, unread) if bridged else None) or []
    legacy = _try(_legacy_tables, unread) or []
    devices = {place.device for place in ports.values()}
    uplinks = {place.uplink for place in ports.values() if place.uplink}
    disciplines = _try(lambda: _disciplines(devices, uplinks), unread) or {}
    named = {chain.name: chain for chain in chains}
    hooked: defaultdict[str, list[_Chain]] = defaultdict(list)
    for chain in chains:
        for device in chain.devices:
            if not chain.empty:
                hooked[device].append(chain)
    passed = {}
    for name, place in ports.items():
        told = [
            *_filters("the nft chain bridge", tables, place),
            *_filters("the ebtables chain", legacy, place),
            *(str(chain) for at in (place.device, place.uplink) if at for chain in hooked.get(at, ())),
            *(f"libvirt's filter {chain}" for chain in _libvirt(place.device) if chain in named),
            *disciplines.get(place.device, ()),
            *disciplines.get(place.uplink or "", ()),
        ]
        if told:
            passed[name] = tuple(dict.fromkeys(told))
    return Found(passed, tuple(unread))


def _try(read: Callable[[], T], unread: list[str]) -> T | None:
    try:
        return read()
    except OffloadError as error:
        unread.append(str(error))
        return None


def _filters(what: str, tables: Iterable[Table], place: Place) -> Iterator[str]:
    if place.bridge is None:
        return
    around = (place.bridge, place.uplink) if place.uplink else (place.bridge,)
    for table in tables:
        for chain in table.concerning(place.device, around):
            yield f"{what} {table.name} {chain}"


def _libvirt(device: str) -> Iterator[str]:
    """Chains that libvirt makes for a device: ebtables' and iptables' own, and those it swaps in."""
    for side in "IOJP":
        yield f"libvirt-{side}-{device}"
        yield f"F{side}-{device}"
        yield f"H{side}-{device}"


# nft


def _chains() -> list[_Chain]:
    """All chains of nft in this network namespace; none where the kernel has no nft."""
    with explained("nft", "list its chains"):
        try:
            opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            with RouteSocket(opened) as netlink:
                return [_chain(body) for body in netlink.dump(_GETCHAIN, nfgen_msg())]
        except OSError as error:
            # EINVAL: nfnetlink has no such subsystem (net/netfilter/nfnetlink.c)
            if error.errno not in (errno.EPROTONOSUPPORT, errno.EINVAL):
                raise
            return []


def _chain(body: bytes) -> _Chain:
    values = attributes(body, _NFGENMSG)
    hook = attributes(values.get(_CHAIN_HOOK, b""))
    devices = [text(hook[_HOOK_DEV])] if _HOOK_DEV in hook else _device_names(hook.get(_HOOK_DEVS, b""))
    policy = values.get(_CHAIN_POLICY)
    drops = policy is not None and int.from_bytes(policy, "big") == _POLICY_DROP
    return _Chain(
        family=_FAMILIES.get(body[0], str(body[0])),
        table=text(values[_CHAIN_TABLE]),
        name=text(values[_CHAIN_NAME]),
        devices=tuple(devices),
        empty=not drops and int.from_bytes(values.get(_CHAIN_USE, b""), "big") == 0,
    )


def _device_names(nested: bytes) -> Iterator[str]:
    """The names in an NFTA_HOOK_DEVS, which are attributes of one type."""
    while nested:
        (length,) = struct.unpack_from("=H", nested)
        yield text(nested[4:length])
        nested = nested[(length + 3) & ~3 :]


def _nft_tables() -> list[Table]:
    return _parsed(of_nft, _printed("nft", "--json", "list", "ruleset", "bridge"), "nft")


# ebtables


def _legacy_tables() -> list[Table]:
    """Tables of the old ebtables. Asking for one makes the kernel load it, so only loaded ones are."""
    modules = ""
    with suppress(FileNotFoundError):  # a kernel without modules
        modules = Path("/proc/modules").read_text()
    loaded = re.findall(r"^ebtable_(filter|nat|broute) ", modules, re.MULTILINE)
    return [
        _parsed(of_ebtables, _printed("ebtables-legacy", "-t", table, "-L"), "ebtables") for table in loaded
    ]


def _printed(program: str, *arguments: str) -> str:
    """What a program prints. Raises KernelError when it is not installed or fails."""
    command = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if command is None:
        package = {"nft": "nftables"}.get(program, "ebtables")
        raise KernelError(
            f"there are rules that only {program} can show, and it is not installed: apt install {package}"
        )
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"`{program} {' '.join(arguments)}` took more than {_TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise KernelError(f"`{program} {' '.join(arguments)}` failed: {said}")
    return done.stdout


def _parsed(parse: Callable[[str], T], printed: str, program: str) -> T:
    try:
        return parse(printed)
    except ValueError as error:
        raise KernelError(f"{program}: {error}") from error


# tc


def _disciplines(devices: Collection[str], uplinks: Collection[str]) -> dict[str, list[str]]:
    """What tc does at ``devices``, and where frames enter ``uplinks``, that is not the kernel's own nor ours.

    What leaves by an uplink passes its qdiscs and filters on every path.
    """
    names = {}
    for device in (*devices, *uplinks):
        with suppress(OSError):  # it is not there
            names[socket.if_nametoindex(device)] = device
    found: defaultdict[str, list[str]] = defaultdict(list)
    with explained("tc", "list qdiscs and filters"), RouteSocket(open_socket()) as netlink:
        if len(names) <= _FEW and _nothing_at(netlink, names, uplinks):
            return {}
        for body in netlink.dump(RTM_GETQDISC, tcmsg()):
            _, ifindex, handle, _, _ = _TCMSG.unpack_from(body)
            if ifindex not in names:
                continue
            kind = text(attributes(body, _TCMSG.size)[_KIND])
            name = names[ifindex]
            leaves = name not in uplinks
            if kind in ("ingress", "clsact"):
                for side in ("ingress", "egress") if kind == "clsact" and leaves else ("ingress",):
                    found[name] += _foreign_filters(netlink, ifindex, side, name)
            elif leaves and handle and kind not in _WITHOUT_RULES:  # the kernel's own choice has no handle
                found[name].append(f"the tc qdisc {kind} of {name}")
    return found


def _nothing_at(netlink: RouteSocket, names: Mapping[int, str], uplinks: Collection[str]) -> bool:
    """Whether ``_disciplines`` has nothing to tell, as far as that is known without listing all qdiscs.

    The kernel lists those of all devices or of none (net/sched/sch_api.c, tc_dump_qdisc).
    """
    for ifindex, name in names.items():
        request = ifinfmsg()
        request["index"] = ifindex
        link = attributes(netlink.get(RTM_GETLINK, request), _IFINFOMSG)
        root = text(link.get(_IFLA_QDISC, b""))
        if root not in _ALONE and name not in uplinks:
            return False
        # Without clsact the kernel takes either side for the ingress.
        if any(True for side in _SIDES for _ in _foreign_filters(netlink, ifindex, side, name)):
            return False
    return True


def _foreign_filters(netlink: RouteSocket, ifindex: int, side: str, device: str) -> Iterator[str]:
    """The kinds of filters at one side of a device, ours left out."""
    request = tcmsg()
    request.update({"index": ifindex, "parent": _SIDES[side]})
    kinds = set()
    for body in netlink.dump(RTM_GETTFILTER, request):
        values = attributes(body, _TCMSG.size)
        if _OPTIONS not in values:
            continue  # the head of a list of filters, not a filter
        kind = text(values[_KIND])
        name = text(attributes(values[_OPTIONS]).get(_BPF_NAME, b"")) if kind == "bpf" else ""
        if not name.startswith(_OURS):
            kinds.add(kind)
    for kind in sorted(kinds):
        yield f"tc {side} filters ({kind}) of {device}"
