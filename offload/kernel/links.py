"""Network devices, bridges and forwarding entries, through route netlink.

Facts about messages are from include/uapi/linux/if_link.h, rtnetlink.h and neighbour.h and from
net/core/rtnetlink.c. MAC addresses are lower-case text with colons, ifindexes are of the
namespace that ``Links`` was opened in.
"""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pyroute2.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, nlmsg
from pyroute2.netlink.rtnl import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETNSID,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_SETLINK,
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_LINK,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg, protinfo_bridge
from pyroute2.netlink.rtnl.ndmsg import (
    NTF_MASTER,
    NTF_SELF,
    NUD_NOARP,
    NUD_PERMANENT,
    NUD_REACHABLE,
    NUD_STALE,
    ndmsg,
)
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg

from offload.closing import Closing
from offload.errors import KernelError
from offload.kernel.failures import explain, explained
from offload.kernel.netns import call_in
from offload.kernel.rtnl import (
    Attributes,
    RouteSocket,
    apart,
    attributes,
    messages,
    number,
    open_socket,
    text,
)
from offload.model import Link

T = TypeVar("T")
EventKind = Literal["changed", "gone", "resync"]


def _numbers(message: type) -> dict[str, int]:
    """Attribute numbers by the kernel's names, from the message class that knows them."""
    return {entry[0]: at for at, entry in enumerate(message.nla_map)}  # type: ignore[attr-defined]


_IFLA = _numbers(ifinfmsg)
_INFO = _numbers(ifinfmsg.ifinfo)
_XDP = _numbers(ifinfmsg.xdp)
_BRPORT = _numbers(protinfo_bridge)
_BR = _numbers(ifinfmsg.ifinfo.bridge_data)
_IFA = _numbers(ifaddrmsg)
_NDA = _numbers(ndmsg)
_NETNSA = _numbers(nsidmsg)

_IFINFO = struct.Struct("=BBHiII")  # family, pad, type, index, flags, change
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_NDMSG = struct.Struct("=BBHiHBB")  # family, pad, pad, ifindex, state, flags, type
_RTGENMSG = 4  # bytes of struct rtgenmsg with its padding
_STATS64 = struct.Struct("=Q8xQ24xQQ")  # ``_COUNTS`` of rtnl_link_stats64
_COUNTS = ("rx_packets", "rx_bytes", "rx_dropped", "tx_dropped")
_INT32 = struct.Struct("=i")

_IFF_UP = 0x1
_IFF_RUNNING = 0x40
_IFF_PROMISC = 0x100
# Values of IFLA_XDP_ATTACHED.
_XDP_MODES = {0: None, 1: "native", 2: "generic", 3: "offload", 4: "several"}
_XDP_SEVERAL = 4
NO_NETNSID = -1  # NETNSA_NSID_NOT_ASSIGNED of include/uapi/linux/net_namespace.h
_EVENT_BUFFER = 8 << 20  # bytes
_VLAN_INFO = struct.Struct("=HHHH")  # length, type, flags and vid of struct bridge_vlan_info as an attribute
# include/uapi/linux/if_bridge.h, and RTEXT_FILTER_BRVLAN_COMPRESSED of rtnetlink.h
_IFLA_BRIDGE_VLAN_INFO = 2
_VLAN_PVID, _VLAN_UNTAGGED, _VLAN_RANGE_BEGIN, _VLAN_RANGE_END = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_BRVLAN_COMPRESSED = 1 << 2
_NESTED = 1 << 15  # NLA_F_NESTED
_BOND_MODE, _BOND_XMIT_HASH_POLICY = 1, 14  # IFLA_BOND_… of include/uapi/linux/if_link.h
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h

PortVlans = tuple[int, tuple[int, ...]]
"""VIDs of a bridge's port: the untagged one or 0, and the tagged ones."""


class Links(Closing):
    """The devices of the current network namespace, or of the one behind the path ``netns``.

    A context manager; ``close()`` is idempotent. What it makes or sets stays in the kernel.
    Methods raise PrivilegeError, UnsupportedError or KernelError that name the device. Safe to
    share between threads, and usable in a thread that runs an asyncio loop (each call is short).
    """

    def __init__(self, netns: str | None = None) -> None:
        self.netns = netns
        with explained("netlink", "open a socket"):
            self._route = RouteSocket(open_socket(netns))
        self._said: dict[bytes, Link] = {}

    def snapshot(self, *, counts: bool = True) -> dict[str, Link]:
        """Every device, by name, as of one moment. Without ``counts`` their counters are 0."""
        with explained("links", "be listed"):
            dump = self._route.dump(RTM_GETLINK, ifinfmsg())
        told = [_apart(body) for body in dump]
        # Of most devices the kernel says what it said the last time, but for the counters.
        links = {said: self._said.get(said) or _link(said) for said, _ in told}
        self._said = links
        names = {link.ifindex: link.name for link in links.values()}
        found = {}
        for said, counted in told:
            link = links[said]
            rest: dict[str, Any] = {} if link.master is None else {"master_name": names.get(link.master)}
            if counts and any(counted):
                rest |= zip(_COUNTS, counted, strict=True)
            found[link.name] = replace(link, **rest) if rest else link
        return found

    def peer(self, link: Link) -> Link:
        """The other end of a veth, read without entering its namespace.

        Its ``ifindex`` and ``master`` are of that namespace; namespace ids are ours everywhere.
        """
        if link.peer_ifindex is None or link.peer_netnsid == NO_NETNSID:
            raise KernelError(f"{link.name}: its other end is in no namespace that can be reached")
        request = _message(ifinfmsg, index=link.peer_ifindex)
        if link.peer_netnsid is not None:
            # The attribute was renamed: IFLA_IF_NETNSID is IFLA_TARGET_NETNSID of newer headers.
            request["attrs"] = [("IFLA_IF_NETNSID", link.peer_netnsid)]
        with explained(link.name, "look at its other end"):
            return _link(self._route.get(RTM_GETLINK, request))

    def bond_options(self, bond: Link) -> tuple[int, int]:
        """Mode and transmit hash of a bond, as numbers of include/uapi/linux/if_bonding.h."""
        with explained(bond.name, "look at its mode"):
            values = attributes(
                self._route.get(RTM_GETLINK, _message(ifinfmsg, index=bond.ifindex)), _IFINFO.size
            )
        info = attributes(values.get(_IFLA["IFLA_LINKINFO"], b""))
        options = attributes(info.get(_INFO["IFLA_INFO_DATA"], b""))
        if _BOND_MODE not in options:
            raise KernelError(f"{bond.name}: the kernel does not tell the mode of this bond")
        return number(options[_BOND_MODE]), number(options.get(_BOND_XMIT_HASH_POLICY, b""))

    def netnsid(self, netns: str) -> int:
        """The id that this namespace knows the one behind the path ``netns`` by; -1: none."""
        with explained(netns, "look up its id"), open(netns, "rb") as file:
            request = _message(nsidmsg, ("NETNSA_FD", file.fileno()))
            found = attributes(self._route.get(RTM_GETNSID, request), _RTGENMSG)
        return int(_INT32.unpack(found[_NETNSA["NETNSA_NSID"]])[0])

    def global_addresses(self, ifindex: int) -> list[str]:
        """IPv4 and IPv6 addresses of a device, link-local ones left out, as ``192.0.2.1/24``."""
        with explained(f"ifindex {ifindex}", "list its addresses"):
            dump = self._route.dump(RTM_GETADDR, ifaddrmsg())
        found = []
        for body in dump:
            _, prefix, _, _, index = _IFADDR.unpack_from(body)
            if index == ifindex:
                values = attributes(body, _IFADDR.size)
                # IFA_ADDRESS is the far end on a point-to-point link; IFA_LOCAL is ours.
                packed = values.get(_IFA["IFA_LOCAL"], values.get(_IFA["IFA_ADDRESS"], b""))
                address = ipaddress.ip_address(packed)
                if not address.is_link_local:
                    found.append(f"{address}/{prefix}")
        return found

    def static_fdb(self, port: int = 0) -> set[tuple[int, str, int]]:
        """Static entries of all bridges as (port's ifindex, MAC, VID); VID 0 where none are filtered.

        With ``port`` those of this ifindex alone. Learnt entries, the bridges' own addresses and the drivers'
        own tables are left out.
        """
        return {
            entry for entry, state, flags in self._fdb(port) if state == NUD_NOARP and not flags & NTF_SELF
        }

    def learned_fdb(self) -> set[tuple[int, str]]:
        """What bridges have learnt and not forgotten yet, as (port's ifindex, MAC), in whichever VLAN."""
        return {
            entry[:2]
            for entry, state, flags in self._fdb()
            if state in (NUD_REACHABLE, NUD_STALE) and not flags & NTF_SELF
        }

    def own_addresses(self, ifindex: int) -> set[str]:
        """Addresses that a device takes frames for beside its own: its unicast filter, and its groups."""
        return {mac for (index, mac, _), _, flags in self._fdb() if index == ifindex and flags & NTF_SELF}

    def set_own_address(self, ifindex: int, mac: str, on: bool) -> None:
        """Let a device take frames for ``mac``, or not any more: ndo_dflt_fdb_add(), net/core/rtnetlink.c."""
        message = _message(
            ndmsg,
            ("NDA_LLADDR", mac),
            family=socket.AF_BRIDGE,
            ifindex=ifindex,
            state=NUD_PERMANENT,
            flags=NTF_SELF,
        )
        doing = f"{'add' if on else 'remove'} its address {mac}"
        flags = NLM_F_CREATE if on else 0
        self._change_port(ifindex, doing, RTM_NEWNEIGH if on else RTM_DELNEIGH, flags, message)

    def _fdb(self, port: int = 0) -> Iterator[tuple[tuple[int, str, int], int, int]]:
        """Entries of bridges and of devices themselves (NTF_SELF), with state and flags; ``port``: its alone.

        The state of a bridge's is as fdb_to_nud() in net/bridge/br_fdb.c has it. Which port is asked for
        stands in an ifinfomsg: valid_fdb_dump_legacy(), net/core/rtnetlink.c.
        """
        kind, field = (ifinfmsg, "index") if port else (ndmsg, "ifindex")
        request = _message(kind, family=socket.AF_BRIDGE, **{field: port})
        with explained("bridges", "list their forwarding entries"):
            dump = self._route.dump(RTM_GETNEIGH, request)
        for body in dump:
            _, _, _, index, state, flags, _ = _NDMSG.unpack_from(body)
            values = attributes(body, _NDMSG.size)
            if _NDA["NDA_MASTER"] in values or flags & NTF_SELF:
                vid = number(values.get(_NDA["NDA_VLAN"], b""))
                yield (index, _mac(values[_NDA["NDA_LLADDR"]]), vid), state, flags

    def bridge_vlans(self) -> dict[int, PortVlans]:
        """VIDs of every port of a bridge that filters VLANs, by ifindex."""
        request = _message(ifinfmsg, ("IFLA_EXT_MASK", _BRVLAN_COMPRESSED), family=socket.AF_BRIDGE)
        with explained("bridges", "list their VLANs"):
            dump = self._route.dump(RTM_GETLINK, request)
        found = {}
        for body in dump:
            _, _, _, index, _, _ = _IFINFO.unpack_from(body)
            values = attributes(body, _IFINFO.size)
            if _IFLA["IFLA_MASTER"] in values and number(values[_IFLA["IFLA_MASTER"]]) != index:
                found[index] = _vlans(values.get(_IFLA["IFLA_AF_SPEC"], b""))
        return found

    def set_bridge_vlans(self, ifindex: int, before: PortVlans, after: PortVlans) -> None:
        """Change the VIDs that a bridge's port has. What stays is not touched."""
        untagged_before, tagged_before = before
        untagged, tagged = after
        gone = {untagged_before, *tagged_before} - {untagged, *tagged} - {0}
        come = set(tagged) - set(tagged_before)
        if come:
            self._vlan_message(ifindex, RTM_SETLINK, "add VLANs at the bridge", _runs(come, 0))
        if untagged and untagged != untagged_before:
            flags = _VLAN_PVID | _VLAN_UNTAGGED
            self._vlan_message(ifindex, RTM_SETLINK, "set its untagged VLAN", _runs({untagged}, flags))
        if gone:
            self._vlan_message(ifindex, RTM_DELLINK, "take VLANs away at the bridge", _runs(gone, 0))

    def _vlan_message(self, ifindex: int, kind: int, doing: str, infos: bytes) -> None:
        request = _message(ifinfmsg, family=socket.AF_BRIDGE, index=ifindex)
        spec = struct.pack("=HH", 4 + len(infos), _IFLA["IFLA_AF_SPEC"] | _NESTED) + infos
        self._change_port(ifindex, doing, kind, 0, request, spec)

    def create_veth(
        self,
        name: str,
        inner: str,
        alias: str,
        mac: str | None = None,
        mtu: int = 1500,
        netns: str | None = None,
    ) -> None:
        """Make a pair of ours, both ends down; ``mac`` is of the end ``name``, ``None`` for a random one.

        ``netns`` is the path of the namespace that the end ``inner`` shall be in, if it is another one.
        """
        elsewhere = [("IFLA_NET_NS_FD", netns)] if netns else []
        peer = {"attrs": [("IFLA_IFNAME", inner), ("IFLA_MTU", mtu), *elsewhere]}
        info = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]
        attrs: list[tuple[str, object]] = [
            ("IFLA_IFNAME", name),
            ("IFLA_MTU", mtu),
            ("IFLA_LINKINFO", {"attrs": info}),
        ]
        if mac:
            attrs.append(("IFLA_ADDRESS", mac))
        with explained(name, "make the veth pair"):
            self._route.change(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, _message(ifinfmsg, *attrs))
        ifindex = self.ifindex(name)
        try:
            for end in (ifindex, *([] if netns else [self.ifindex(inner)])):
                self._set(end, "give it an alias", ("IFLA_IFALIAS", alias))
        except BaseException:
            self.delete_link(ifindex)
            raise

    def ifindex(self, name: str) -> int:
        """The number of the device ``name``."""
        with explained(name, "look it up"):
            return self._named(name).ifindex

    def find(self, name: str, *, counts: bool = True) -> Link | None:
        """The device ``name`` without its master's name, ``None`` when there is none. Lists no others.

        Without ``counts`` its counters are 0.
        """
        try:
            return self._named(name, counts=counts)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise explain(error, name, "look it up") from error

    def at(self, ifindex: int) -> Link | None:
        """As ``find``, for the device with this number."""
        try:
            return _link(self._route.get(RTM_GETLINK, _message(ifinfmsg, index=ifindex)))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise explain(error, f"ifindex {ifindex}", "look it up") from error

    def _named(self, name: str, *, counts: bool = True) -> Link:
        body = self._route.get(RTM_GETLINK, _message(ifinfmsg, ("IFLA_IFNAME", name)))
        return _link(body if counts else _apart(body)[0])

    def set_mac(self, ifindex: int, mac: str) -> None:
        self._set(ifindex, f"give it the MAC {mac}", ("IFLA_ADDRESS", mac))

    def set_mtu(self, ifindex: int, mtu: int) -> None:
        """``mtu`` is in bytes without the Ethernet header."""
        self._set(ifindex, f"set its MTU to {mtu}", ("IFLA_MTU", mtu))

    def create_bridge(self, name: str, alias: str, vlan_filtering: bool) -> int:
        """Make a bridge that forwards at once and speaks no protocol of its own; returns its ifindex.

        Its MAC is random, locally administered and set explicitly: otherwise the kernel would
        give it the lowest MAC of its ports, a new one whenever ports come and go.
        """
        mac = bytes([secrets.randbelow(256) & 0xFC | 0x02]) + secrets.token_bytes(5)
        settings = [
            ("IFLA_BR_STP_STATE", 0),
            ("IFLA_BR_FORWARD_DELAY", 0),
            ("IFLA_BR_MCAST_SNOOPING", 0),
        ]
        if vlan_filtering:
            # Without a default VID, what has not been given its VLANs yet takes part in none.
            settings += [("IFLA_BR_VLAN_FILTERING", 1), ("IFLA_BR_VLAN_DEFAULT_PVID", 0)]
        info = [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", {"attrs": settings})]
        request = _message(
            ifinfmsg,
            ("IFLA_IFNAME", name),
            ("IFLA_ADDRESS", _mac(mac)),
            ("IFLA_LINKINFO", {"attrs": info}),
        )
        with explained(name, "make the bridge"):
            self._route.change(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, request)
        ifindex = self.ifindex(name)
        try:
            # The kernel takes no alias in the message that makes a device.
            self._set(ifindex, "give it an alias", ("IFLA_IFALIAS", alias))
        except BaseException:
            self.delete_link(ifindex)
            raise
        return ifindex

    def delete_link(self, ifindex: int) -> None:
        """Delete a device; one that is already gone is as it should be."""
        try:
            self._route.change(RTM_DELLINK, 0, _message(ifinfmsg, index=ifindex))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise explain(error, self._name(ifindex), "delete it") from error

    def set_master(self, ifindex: int, master_ifindex: int) -> None:
        """Put a device into a bridge; 0 takes it out of the one it is in."""
        doing = "put it into the bridge" if master_ifindex else "take it out of its bridge"
        self._set(ifindex, doing, ("IFLA_MASTER", master_ifindex))

    def set_up(self, ifindex: int, up: bool) -> None:
        self._set_flag(ifindex, _IFF_UP, up, f"set it {'up' if up else 'down'}")

    def set_promiscuous(self, ifindex: int, promiscuous: bool) -> None:
        """Hold or let go of promiscuity for user space; a bridge's own hold is not touched."""
        self._set_flag(ifindex, _IFF_PROMISC, promiscuous, "change promiscuity")

    def set_bridge_port(self, ifindex: int, learning: bool, unicast_flood: bool, group_forward: int) -> None:
        """Set whether the bridge learns from this port, and what it floods to it.

        ``group_forward`` is a mask of link-local group addresses that pass: see ``model.BridgePort``.
        """
        flags = [
            ("IFLA_BRPORT_LEARNING", int(learning)),
            ("IFLA_BRPORT_UNICAST_FLOOD", int(unicast_flood)),
            ("IFLA_BRPORT_GROUP_FWD_MASK", group_forward),
        ]
        info = [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": flags})]
        request = _message(ifinfmsg, ("IFLA_LINKINFO", {"attrs": info}), index=ifindex)
        self._change_port(ifindex, "set its bridge port flags", RTM_NEWLINK, 0, request)

    def add_fdb(self, ifindex: int, mac: str, vid: int = 0) -> None:
        """Tell the bridge statically that ``mac`` is behind this port, wherever it was before.

        ``vid`` 0: the bridge filters no VLANs.
        """
        flags = NLM_F_CREATE | NLM_F_REPLACE
        request = _fdb(ifindex, mac, vid)
        self._change_port(ifindex, f"add forwarding entry {mac}", RTM_NEWNEIGH, flags, request)

    def del_fdb(self, ifindex: int, mac: str, vid: int = 0) -> None:
        """Take the entry back.

        The bridge matches the port too. A missing entry is as it should be, and so is a port that
        left its bridge or the VLAN, which took its entries along.
        """
        try:
            self._route.change(RTM_DELNEIGH, 0, _fdb(ifindex, mac, vid))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                doing = f"remove forwarding entry {mac}"
                raise explain(error, self._name(ifindex), doing) from error

    def ipv6_disabled(self, name: str) -> bool | None:
        """Whether IPv6 is off on a device; None where the kernel or the device has no IPv6."""
        path = _ipv6_path(name)
        try:
            return self._inside(path.read_text).strip() != "0"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, name, "read whether IPv6 is off") from error

    def set_ipv6_disabled(self, name: str, disabled: bool) -> None:
        """Switch IPv6 off or on. Off succeeds where there is no IPv6 at all."""
        path = _ipv6_path(name)
        try:
            self._inside(lambda: path.write_text(str(int(disabled))))
        except OSError as error:
            if not (disabled and error.errno == errno.ENOENT):
                raise explain(error, name, f"switch IPv6 {'off' if disabled else 'on'}") from error

    def events(self) -> LinkEvents:
        """Changes of devices from now on. The caller closes it."""
        return LinkEvents(self.netns)

    def close(self) -> None:
        self._route.close()

    def _set(self, ifindex: int, doing: str, attribute: tuple[str, object]) -> None:
        request = _message(ifinfmsg, attribute, index=ifindex)
        self._change(ifindex, doing, RTM_SETLINK, 0, request)

    def _set_flag(self, ifindex: int, flag: int, on: bool, doing: str) -> None:
        request = _message(ifinfmsg, index=ifindex, flags=flag if on else 0, change=flag)
        self._change(ifindex, doing, RTM_SETLINK, 0, request)

    def _change(self, ifindex: int, doing: str, kind: int, flags: int, request: nlmsg) -> None:
        try:
            self._route.change(kind, flags, request)
        except OSError as error:
            raise explain(error, self._name(ifindex), doing) from error

    def _change_port(
        self, ifindex: int, doing: str, kind: int, flags: int, request: nlmsg, more: bytes = b""
    ) -> None:
        """As ``_change``, for what the kernel says "not supported" to when the device is no port."""
        try:
            self._route.change(kind, flags, request, more)
        except OSError as error:
            name = self._name(ifindex)
            if error.errno == errno.EOPNOTSUPP:
                raise KernelError(f"{name}: cannot {doing}: it is in no bridge") from error
            raise explain(error, name, doing) from error

    def _name(self, ifindex: int) -> str:
        """A device's name for a message, or its number when it is gone."""
        with suppress(OSError):
            return _link(self._route.get(RTM_GETLINK, _message(ifinfmsg, index=ifindex))).name
        return f"ifindex {ifindex}"

    def _inside(self, func: Callable[[], T]) -> T:
        return func() if self.netns is None else call_in(self.netns, func)


@dataclass(frozen=True)
class LinkEvent:
    """Something happened to a device; a fresh snapshot says what.

    The name is empty when it is an address of the device that came or went.
    ``resync``: the kernel had more to say than the socket could hold, anything may have
    happened; ``ifindex`` is 0 and ``name`` empty then.
    """

    ifindex: int
    name: str
    kind: EventKind


class LinkEvents(Closing):
    """Notifications about devices, for ``loop.add_reader(events.fileno(), …)`` and ``drain()``."""

    def __init__(self, netns: str | None = None) -> None:
        with explained("netlink", "listen for device changes"):
            self._socket = open_socket(netns, groups=RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
        self._socket.setblocking(False)
        with suppress(PermissionError):  # a smaller buffer only makes a resync likelier
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER)

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> list[LinkEvent]:
        """All events so far, in order; empty when there are none."""
        events: list[LinkEvent] = []
        while True:
            try:
                data = self._socket.recv(1 << 17)
            except BlockingIOError:
                return events
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise explain(error, "netlink", "read device changes") from error
                events.append(LinkEvent(0, "", "resync"))
                continue
            events.extend(_event(kind, body) for kind, _, _, body in messages(data))

    def close(self) -> None:
        self._socket.close()


def _event(kind: int, body: bytes) -> LinkEvent:
    if kind in (RTM_NEWADDR, RTM_DELADDR):
        *_, index = _IFADDR.unpack_from(body)
        return LinkEvent(index, "", "changed")
    family, _, _, index, _, _ = _IFINFO.unpack_from(body)
    name = text(attributes(body, _IFINFO.size).get(_IFLA["IFLA_IFNAME"], b""))
    # With AF_BRIDGE a DELLINK says that a port left its bridge, not that the device is gone.
    gone = kind == RTM_DELLINK and family != socket.AF_BRIDGE
    return LinkEvent(index, name, "gone" if gone else "changed")


def _apart(body: bytes) -> tuple[bytes, tuple[int, ...]]:
    """A link message without its counters, and those of ``_COUNTS``."""
    said, counted = apart(body, (_IFLA["IFLA_STATS"], _IFLA["IFLA_STATS64"]), _IFINFO.size)
    stats = counted.get(_IFLA["IFLA_STATS64"])
    return said, _STATS64.unpack_from(stats) if stats else (0, 0, 0, 0)


def _link(body: bytes) -> Link:
    """A link message without its master's name, which the message does not have."""
    _, _, _, index, flags, _ = _IFINFO.unpack_from(body)
    values = attributes(body, _IFINFO.size)
    info = attributes(values.get(_IFLA["IFLA_LINKINFO"], b""))
    kind = text(info[_INFO["IFLA_INFO_KIND"]]) if _INFO["IFLA_INFO_KIND"] in info else None
    master = values.get(_IFLA["IFLA_MASTER"])
    alias = values.get(_IFLA["IFLA_IFALIAS"])
    stats = values.get(_IFLA["IFLA_STATS64"])
    counts = _STATS64.unpack_from(stats) if stats else (0, 0, 0, 0)
    rx_packets, rx_bytes, rx_dropped, tx_dropped = counts
    xdp_mode, xdp_prog_id = _xdp(attributes(values.get(_IFLA["IFLA_XDP"], b"")))
    learning, unicast_flood, group_forward = _port_flags(info)
    peer_ifindex = peer_netnsid = lower_ifindex = None
    if kind != "veth" and _IFLA["IFLA_LINK"] in values and _IFLA["IFLA_LINK_NETNSID"] not in values:
        lower_ifindex = number(values[_IFLA["IFLA_LINK"]])
    if kind == "veth" and _IFLA["IFLA_LINK"] in values:
        peer_ifindex = number(values[_IFLA["IFLA_LINK"]])
        if _IFLA["IFLA_LINK_NETNSID"] in values:
            (peer_netnsid,) = _INT32.unpack(values[_IFLA["IFLA_LINK_NETNSID"]])
    return Link(
        ifindex=index,
        name=text(values[_IFLA["IFLA_IFNAME"]]),
        kind=kind,
        mac=_mac(values.get(_IFLA["IFLA_ADDRESS"], b"")),
        mtu=number(values[_IFLA["IFLA_MTU"]]),
        up=bool(flags & _IFF_UP),
        running=bool(flags & _IFF_RUNNING),
        promiscuous=bool(flags & _IFF_PROMISC),
        alias=text(alias) if alias else None,
        master=number(master) if master else None,
        master_name=None,
        rx_queues=number(values[_IFLA["IFLA_NUM_RX_QUEUES"]]),
        tx_queues=number(values[_IFLA["IFLA_NUM_TX_QUEUES"]]),
        peer_ifindex=peer_ifindex,
        peer_netnsid=peer_netnsid,
        lower_ifindex=lower_ifindex,
        xdp_mode=xdp_mode,
        xdp_prog_id=xdp_prog_id,
        learning=learning,
        unicast_flood=unicast_flood,
        group_forward=group_forward,
        vlan_filtering=_filtering(info) if kind == "bridge" else None,
        rx_packets=rx_packets,
        rx_bytes=rx_bytes,
        rx_dropped=rx_dropped,
        tx_dropped=tx_dropped,
    )


def _xdp(values: Attributes) -> tuple[str | None, int]:
    attached = number(values.get(_XDP["IFLA_XDP_ATTACHED"], b""))
    program = values.get(_XDP["IFLA_XDP_PROG_ID"], b"")
    if attached == _XDP_SEVERAL:  # then each mode has its own id; the native one runs first
        program = values.get(_XDP["IFLA_XDP_DRV_PROG_ID"], b"")
    return _XDP_MODES.get(attached), number(program)


def _port_flags(info: Attributes) -> tuple[bool | None, bool | None, int | None]:
    if text(info.get(_INFO["IFLA_INFO_SLAVE_KIND"], b"")) != "bridge":
        return None, None, None
    values = attributes(info[_INFO["IFLA_INFO_SLAVE_DATA"]])
    return (
        bool(number(values[_BRPORT["IFLA_BRPORT_LEARNING"]])),
        bool(number(values[_BRPORT["IFLA_BRPORT_UNICAST_FLOOD"]])),
        number(values[_BRPORT["IFLA_BRPORT_GROUP_FWD_MASK"]]),
    )


def _filtering(info: Attributes) -> bool:
    values = attributes(info.get(_INFO["IFLA_INFO_DATA"], b""))
    return bool(number(values.get(_BR["IFLA_BR_VLAN_FILTERING"], b"")))


def _vlans(spec: bytes) -> PortVlans:
    """The untagged VID and the tagged ones of a port, from its IFLA_AF_SPEC."""
    tagged: list[int] = []
    untagged, begin = 0, 0
    for flags, vid in _vlan_infos(spec):
        if flags & _VLAN_RANGE_BEGIN:
            begin = vid
        elif flags & _VLAN_UNTAGGED:
            untagged = vid
        else:
            tagged += range(begin if flags & _VLAN_RANGE_END else vid, vid + 1)
    return untagged, tuple(tagged)


def _vlan_infos(spec: bytes) -> Iterator[tuple[int, int]]:
    offset = 0
    while offset + _VLAN_INFO.size <= len(spec):
        length, kind, flags, vid = _VLAN_INFO.unpack_from(spec, offset)
        if kind == _IFLA_BRIDGE_VLAN_INFO:
            yield flags, vid
        offset += (length + 3) & ~3


def _runs(vids: Collection[int], flags: int) -> bytes:
    """VIDs as attributes, each run of neighbours as a range."""
    infos = b""
    for vid in sorted(vids):
        starts, ends = vid - 1 not in vids, vid + 1 not in vids
        if starts or ends:
            bound = 0 if starts and ends else _VLAN_RANGE_BEGIN if starts else _VLAN_RANGE_END
            infos += _VLAN_INFO.pack(_VLAN_INFO.size, _IFLA_BRIDGE_VLAN_INFO, flags | bound, vid)
    return infos


def _fdb(ifindex: int, mac: str, vid: int) -> nlmsg:
    attrs: list[tuple[str, object]] = [("NDA_LLADDR", mac)]
    if vid:
        attrs.append(("NDA_VLAN", vid))
    return _message(
        ndmsg, *attrs, family=socket.AF_BRIDGE, ifindex=ifindex, state=NUD_NOARP, flags=NTF_MASTER
    )


def _message(kind: type[nlmsg], *attrs: tuple[str, object], **fields: int) -> nlmsg:
    """A message of pyroute2 with the header fields and attributes that are given."""
    message = kind()
    message.update(fields)
    message["attrs"] = [list(attribute) for attribute in attrs]
    return message


def _ipv6_path(name: str) -> Path:
    return Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")


def _mac(address: bytes) -> str:
    return address.hex(":")
