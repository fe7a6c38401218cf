"""Addresses and routes of the host, through route netlink.

Facts about messages are from include/uapi/linux/if_addr.h, rtnetlink.h and if_link.h, and from
net/ipv4/devinet.c, net/ipv4/fib_frontend.c and net/ipv6/addrconf.c. Addresses are text with
their prefix length, as in ``192.0.2.1/24``; routes name devices, not numbers. Netlink is in host
byte order, addresses in it are in network byte order.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from pyroute2.netlink import NLM_F_CREATE, NLM_F_REPLACE
from pyroute2.netlink.rtnl import (
    RTM_DELADDR,
    RTM_DELROUTE,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWROUTE,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from offload.closing import Closing
from offload.errors import KernelError
from offload.kernel import resolved
from offload.kernel.failures import explain, explained
from offload.kernel.rtnl import Attributes, RouteSocket, attributes, number, open_socket
from offload.model import (
    Address,
    Carried,
    CarriedAddress,
    Change,
    Link,
    LinkDns,
    Resource,
    Route,
    RouteTarget,
    State,
    Value,
)
from offload.takeover import NO_PREFIX_ROUTE, RTA_VIA, Confirmation, HostNetwork

Extras = tuple[tuple[int, str], ...]

_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, ifindex
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, proto, scope, type, flags
_NEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, ifindex of struct rtnexthop
_IFINFO_SIZE = 16
_ATTRIBUTE = struct.Struct("=HH")
_UINT32 = struct.Struct("=I")
_LIFETIMES = struct.Struct("=IIII")  # preferred, valid, created, updated of struct ifa_cacheinfo

_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 4, 6, 8
_IFA_KEPT = {3, _IFA_BROADCAST, 9, 11}  # with the label, the route priority and the protocol
_IFA_F_NODAD = 0x02
# With HOMEADDRESS, MANAGETEMPADDR and MCAUTOJOIN; the rest is the kernel's own doing.
_IFA_F_KEPT = _IFA_F_NODAD | 0x10 | 0x100 | NO_PREFIX_ROUTE | 0x400
_FOREVER = 0xFFFFFFFF

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_FLOW, _RTA_TABLE, _RTA_PREF = 8, 9, 11, 15, 20
_RTA_ENCAP_TYPE, _RTA_NH_ID = 21, 30
_RTA_KEPT = {_RTA_METRICS, _RTA_FLOW, RTA_VIA, _RTA_PREF}
_RTN_UNICAST = 1
_RTPROT_KERNEL = 2
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 4
_LOCAL_TABLE = 255
_IFLA_PERM_ADDRESS = 54
_GONE = (errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENOENT)


class HostNet(Closing):
    """The host's addresses and routes in the current network namespace.

    A context manager; ``close()`` is idempotent. What it sets stays in the kernel. Methods
    raise PrivilegeError, UnsupportedError or KernelError that name the device.
    """

    def __init__(self) -> None:
        with explained("netlink", "open a socket"):
            self._route = RouteSocket(open_socket())

    # Reading

    def read(
        self,
        nics: Collection[Link],
        originals: State,
        confirmed: Iterable[Confirmation] = (),
        may_take: bool = False,
    ) -> HostNetwork:
        """What the host has on ``nics``, beside what the journal says was taken from them.

        The kernel lists all addresses and routes of the host for it; without ``nics`` it is not asked.
        """
        carried = self._carried(nics) if nics else {}
        routes, unmovable = self._movable(nics, carried) if nics else ({}, {})
        return HostNetwork(
            carried={resource: how.as_value() for resource, how in carried.items()},
            routes={route: target.as_value() for route, target in routes.items()},
            unmovable=unmovable,
            taken={
                resource: value
                for resource, value in originals.items()
                if isinstance(resource, Carried | Route)
            },
            macs={nic.name: self.permanent_mac(nic) for nic in nics},
            dns={nic.name: dns for nic in nics if (dns := resolved.settings(nic.ifindex))},
            confirmed=frozenset(confirmed),
            may_take=may_take,
        )

    def observe(self, asked: Iterable[Resource]) -> dict[Resource, Value]:
        """How those of ``asked`` that are ours to read are now; ``None`` where one is not there."""
        wanted = [item for item in asked if isinstance(item, Address | Carried | LinkDns | Route)]
        state: dict[Resource, Value] = dict.fromkeys(wanted)
        if any(isinstance(resource, Address | Carried) for resource in wanted):
            on = list(self._addresses())
            found: dict[tuple[str, str], CarriedAddress] = {
                (_device(ifindex), text): how for ifindex, text, how in on
            }
            for resource in wanted:
                match resource:
                    case Address(interface, address) if (interface, address) in found:
                        alone = found[interface, address].flags & NO_PREFIX_ROUTE
                        state[resource] = "alone" if alone else True
                    case Carried(device, _, address) if (device, address) in found:
                        state[resource] = found[device, address].as_value()
        for resource in wanted:
            if isinstance(resource, LinkDns):
                with suppress(OSError):  # the interface is still to be made
                    state[resource] = resolved.settings(socket.if_nametoindex(resource.interface))
        if any(isinstance(resource, Route) for resource in wanted):
            routes = {route: target for route, target, trouble in self._routes() if not trouble}
            state |= {
                resource: routes[resource].as_value()
                for resource in wanted
                if isinstance(resource, Route) and resource in routes
            }
        return state

    def permanent_mac(self, link: Link) -> str:
        """The MAC that a NIC was made with; of a device that has none, the one that it has now."""
        request = ifinfmsg()
        request["index"] = link.ifindex
        with explained(link.name, "read its permanent address"):
            found = attributes(self._route.get(RTM_GETLINK, request), _IFINFO_SIZE)
        return found[_IFLA_PERM_ADDRESS].hex(":") if _IFLA_PERM_ADDRESS in found else link.mac

    def _carried(self, nics: Collection[Link]) -> dict[Carried, CarriedAddress]:
        names = {nic.ifindex: nic.name for nic in nics}
        return {
            Carried(names[ifindex], ifindex, text): how
            for ifindex, text, how in self._addresses()
            if ifindex in names and not _stays(text)
        }

    def _addresses(self) -> Iterator[tuple[int, str, CarriedAddress]]:
        """Ifindex, address and the rest of every address there is."""
        with explained("addresses", "be listed"):
            dump = self._route.dump(RTM_GETADDR, ifaddrmsg())
        for place, body in enumerate(dump):
            _, prefix, flags, scope, ifindex = _IFADDR.unpack_from(body)
            values = attributes(body, _IFADDR.size)
            # IFA_ADDRESS is the far end on a point-to-point link; IFA_LOCAL is ours.
            packed = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS, b""))
            if _IFA_FLAGS in values:
                flags = number(values[_IFA_FLAGS])
            preferred, valid = _FOREVER, _FOREVER
            if _IFA_CACHEINFO in values:
                preferred, valid, _, _ = _LIFETIMES.unpack(values[_IFA_CACHEINFO])
            kept = set(_IFA_KEPT)
            if len(packed) == 4 and values.get(_IFA_ADDRESS) != packed:
                kept.add(_IFA_ADDRESS)
            how = CarriedAddress(
                # IPv4 lists what came first at the front, IPv6 at the end.
                place=place if len(packed) == 4 else len(dump) - place,
                scope=scope,
                flags=flags & _IFA_F_KEPT,
                valid=_end(valid),
                preferred=_end(preferred),
                attributes=_extras(values, kept),
            )
            yield ifindex, f"{ipaddress.ip_address(packed)}/{prefix}", how

    def _movable(
        self, nics: Collection[Link], carried: Mapping[Carried, CarriedAddress]
    ) -> tuple[dict[Route, RouteTarget], dict[str, tuple[str, ...]]]:
        """Routes through ``nics`` that somebody made, and what cannot be moved from each NIC."""
        names = {nic.name for nic in nics}
        automatic = {
            (resource.device, str(ipaddress.ip_interface(resource.address).network))
            for resource, how in carried.items()
            if not how.flags & NO_PREFIX_ROUTE
        }
        routes: dict[Route, RouteTarget] = {}
        unmovable: dict[str, tuple[str, ...]] = {}

        def refuse(nic: str, reason: str) -> None:
            unmovable[nic] = (*unmovable.get(nic, ()), reason)

        for resource, how in carried.items():
            if any(kind == _IFA_ADDRESS for kind, _ in how.attributes):
                refuse(resource.device, f"a point-to-point address, {resource.address}")
        for route, target, trouble in self._routes():
            touched = set(target.device.split()) & names
            if trouble:
                for nic in touched:
                    refuse(nic, f"a route to {route.to} {trouble}")
            elif touched and not _automatic(route, target, automatic):
                if route in routes:
                    refuse(target.device, f"several routes to {route.to} with the metric {route.metric}")
                routes[route] = target
        return routes, unmovable

    def _routes(self) -> Iterator[tuple[Route, RouteTarget, str]]:
        """Every unicast route through a device, and why it cannot be set again ("" if it can).

        Of one with several next hops ``device`` lists all of their devices.
        """
        with explained("routes", "be listed"):
            # A kernel without IPv6 answers with all that it has.
            dump = [
                body
                for family in (socket.AF_INET, socket.AF_INET6)
                for body in self._route.dump(RTM_GETROUTE, _family(family))
                if body[0] == family
            ]
        for body in dump:
            family, length, _, tos, table, proto, scope, kind, flags = _RTMSG.unpack_from(body)
            values = attributes(body, _RTMSG.size)
            if _RTA_TABLE in values:
                table = number(values[_RTA_TABLE])
            if kind != _RTN_UNICAST or flags & _RTM_F_CLONED or table == _LOCAL_TABLE:
                continue
            size = 4 if family == socket.AF_INET else 16
            to = ipaddress.ip_network((values.get(_RTA_DST, bytes(size)), length))
            route = Route(str(to), table, number(values.get(_RTA_PRIORITY, b"")), tos)
            indexes = [number(values[_RTA_OIF])] if _RTA_OIF in values else []
            trouble = ""
            if _RTA_MULTIPATH in values:
                indexes += _next_hops(values[_RTA_MULTIPATH])
                trouble = "over several next hops"
            if _RTA_ENCAP_TYPE in values:
                trouble = "with an encapsulation"
            if _RTA_NH_ID in values:
                trouble = "over a next hop object"
            extras = {kind: value for kind, value in values.items() if number(value) or kind != _RTA_PREF}
            target = RouteTarget(
                device=" ".join(_device(index) for index in indexes),
                via=_address(values.get(_RTA_GATEWAY)),
                src=_address(values.get(_RTA_PREFSRC)),
                proto=proto,
                scope=scope,
                flags=flags & _RTNH_F_ONLINK,
                attributes=_extras(extras, _RTA_KEPT),
            )
            if indexes:
                yield route, target, trouble

    # Changing

    def execute(self, change: Change) -> None:
        """Make one change of an ``Address``, ``Carried``, ``Route`` or ``LinkDns``."""
        after = change.after
        match change.resource:
            case Address(interface, address):
                if change.before is not None:
                    self._delete_address(interface, address)
                if after is not None:
                    self._add_address(interface, address, _ours(address, alone=after == "alone"))
            case Carried(device, _, address):
                if isinstance(after, tuple):
                    self._add_address(device, address, CarriedAddress.of(after))
                else:
                    self._delete_address(device, address)
            case Route() as route:
                if isinstance(after, tuple):
                    self._set_route(route, RouteTarget.of(after))
                elif isinstance(change.before, tuple):
                    self._delete_route(route, RouteTarget.of(change.before))
            case LinkDns():
                resolved.set_up(change.resource, after)
            case _:
                raise TypeError(f"{change.resource} is no address and no route")

    def _add_address(self, device: str, address: str, how: CarriedAddress) -> None:
        """Put an address on a device, usable at once: nobody is asked whether he has it (``nodad``).

        One whose lifetime has ended meanwhile stays away.
        """
        left = _left(how.valid)
        if left == 0:
            return
        interface = ipaddress.ip_interface(address)
        ipv6 = interface.version == 6
        for flags in (how.flags | _IFA_F_NODAD, how.flags) if ipv6 else (how.flags,):
            # The second message of IPv6 only takes the flag back: it would hold for later, too.
            more = [
                _attribute(_IFA_LOCAL, interface.ip.packed),
                _attribute(_IFA_FLAGS, _UINT32.pack(flags)),
                _attribute(_IFA_CACHEINFO, _LIFETIMES.pack(_left(how.preferred), left, 0, 0)),
                *_raw(how.attributes),
            ]
            if not any(kind == _IFA_ADDRESS for kind, _ in how.attributes):
                more.append(_attribute(_IFA_ADDRESS, interface.ip.packed))
            request = _address_message(_index(device), interface, how.scope)
            with explained(device, f"give it the address {address}"):
                self._route.change(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, request, b"".join(more))

    def _delete_address(self, device: str, address: str) -> None:
        """Take an address from a device; one that is not there is as it should be."""
        interface = ipaddress.ip_interface(address)
        request = _address_message(_index(device), interface, 0)
        local = _attribute(_IFA_LOCAL, interface.ip.packed)
        try:
            self._route.change(RTM_DELADDR, 0, request, local)
        except OSError as error:
            if error.errno not in _GONE:
                raise explain(error, device, f"take the address {address} from it") from error

    def _set_route(self, route: Route, target: RouteTarget) -> None:
        """Make a route, in the place of the one that there is: no frame finds none in between."""
        message, more = _route_message(route, target), _route_attributes(route, target)
        with explained(target.device, f"lead the route to {route.to} through it"):
            self._route.change(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, message, more)

    def _delete_route(self, route: Route, target: RouteTarget) -> None:
        """Remove a route; one that is not there is as it should be."""
        message, more = _route_message(route, target), _route_attributes(route, target)
        try:
            self._route.change(RTM_DELROUTE, 0, message, more)
        except OSError as error:
            if error.errno not in _GONE:
                raise explain(error, target.device, f"remove the route to {route.to}") from error

    def close(self) -> None:
        self._route.close()


def _stays(address: str) -> bool:
    """Whether an address belongs to its device whatever happens: IPv6's link-local ones."""
    ip = ipaddress.ip_interface(address)
    return ip.version == 6 and ip.is_link_local


def _ours(address: str, *, alone: bool) -> CarriedAddress:
    """An address of the host's interface: for ever, with its network's broadcast address."""
    network = ipaddress.ip_interface(address).network
    extras: Extras = ()
    if network.version == 4 and network.num_addresses > 2:
        extras = ((_IFA_BROADCAST, network.broadcast_address.packed.hex()),)
    return CarriedAddress(0, 0, NO_PREFIX_ROUTE if alone else 0, None, None, extras)


def _automatic(route: Route, target: RouteTarget, networks: Collection[tuple[str, str]]) -> bool:
    """Whether the kernel made a route together with an address, and will again."""
    if target.proto != _RTPROT_KERNEL or target.via is not None:
        return False
    network = ipaddress.ip_network(route.to)
    return (target.device, route.to) in networks or (network.version == 6 and network.is_link_local)


def _next_hops(value: bytes) -> Iterator[int]:
    """The ifindexes in an RTA_MULTIPATH."""
    offset = 0
    while offset + _NEXTHOP.size <= len(value):
        length, _, _, ifindex = _NEXTHOP.unpack_from(value, offset)
        if length < _NEXTHOP.size:
            raise KernelError(f"the kernel lists a next hop of {length} bytes")
        yield ifindex
        offset += (length + 3) & ~3


def _end(seconds: int) -> int | None:
    """A lifetime that is left as the moment, in seconds since boot, at which it ends."""
    return None if seconds == _FOREVER else _uptime() + seconds


def _left(end: int | None) -> int:
    """The inverse of ``_end``; 0 when it has passed."""
    return _FOREVER if end is None else max(0, end - _uptime())


def _uptime() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


def _address(packed: bytes | None) -> str | None:
    return None if packed is None else str(ipaddress.ip_address(packed))


def _extras(values: Attributes, kept: Collection[int]) -> Extras:
    return tuple((kind, values[kind].hex()) for kind in sorted(values) if kind in kept)


def _raw(extras: Extras) -> list[bytes]:
    return [_attribute(kind, bytes.fromhex(value)) for kind, value in extras]


def _attribute(kind: int, value: bytes) -> bytes:
    return (_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value).ljust(
        (_ATTRIBUTE.size + len(value) + 3) & ~3, b"\0"
    )


def _address_message(
    ifindex: int, interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface, scope: int
) -> ifaddrmsg:
    request = ifaddrmsg()
    request["family"] = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    request["prefixlen"] = interface.network.prefixlen
    request["index"] = ifindex
    request["scope"] = scope
    return request


def _family(family: int) -> rtmsg:
    request = rtmsg()
    request["family"] = family
    return request


def _route_message(route: Route, target: RouteTarget) -> rtmsg:
    network = ipaddress.ip_network(route.to)
    request = _family(socket.AF_INET if network.version == 4 else socket.AF_INET6)
    request["dst_len"] = network.prefixlen
    request["tos"] = route.tos
    request["proto"] = target.proto
    request["scope"] = target.scope
    request["type"] = _RTN_UNICAST
    request["flags"] = target.flags
    return request


def _route_attributes(route: Route, target: RouteTarget) -> bytes:
    """What follows the header of a route message, RTA_… by RTA_…."""
    more = [
        _attribute(_RTA_DST, ipaddress.ip_network(route.to).network_address.packed),
        _attribute(_RTA_TABLE, _UINT32.pack(route.table)),
        _attribute(_RTA_PRIORITY, _UINT32.pack(route.metric)),
        _attribute(_RTA_OIF, _UINT32.pack(_index(target.device))),
        *_raw(target.attributes),
    ]
    for kind, address in ((_RTA_GATEWAY, target.via), (_RTA_PREFSRC, target.src)):
        if address is not None:
            more.append(_attribute(kind, ipaddress.ip_address(address).packed))
    return b"".join(more)


def _device(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"ifindex {ifindex}"  # it went while we looked


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError as error:
        raise KernelError(f"there is no device {device} any more") from error
