"""Taking over a NIC that carries the host's addresses: what moves where, and what stands against it. Pure.

The addresses and routes of such a NIC move to the host's interface on the switch, so that
nobody notices: first each address is on both, then the routes are replaced in place, then the NIC's
addresses go. What moved is kept in the journal and goes back from there. The same addresses decide
whether a takeover was confirmed before.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from .config import Config, HostConfig
from .model import (
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

NO_PREFIX_ROUTE = 0x200  # IFA_F_NOPREFIXROUTE of include/uapi/linux/if_addr.h
MAIN_TABLE = 254  # RT_TABLE_MAIN and what follows: include/uapi/linux/rtnetlink.h
SCOPE_UNIVERSE = 0
SCOPE_LINK = 253
PROTO_STATIC = 4
RTA_VIA = 18
IPV6_METRIC = 1024  # of a route that names none: IP6_RT_PRIO_USER of include/uapi/linux/ipv6_route.h
_DEFAULTS = {4: "0.0.0.0/0", 6: "::/0"}


@dataclass(frozen=True)
class Confirmation:
    """A takeover that somebody confirmed: the NIC by its permanent MAC, and the addresses that it had."""

    mac: str
    addresses: frozenset[str]


@dataclass(frozen=True)
class HostNetwork:
    """What the host has on the uplinks that are new or that it shares with a switch.

    ``carried`` are its addresses there, ``routes`` the routes through them that somebody made,
    both in the kernel's order. ``unmovable`` tells by NIC what cannot be moved.
    ``taken`` is what the journal knows of addresses and routes that were moved. ``macs`` are the
    permanent addresses of the NICs, ``dns`` their settings at systemd-resolved.
    ``may_take``: a takeover may begin that was never confirmed.
    """

    carried: Mapping[Carried, tuple[object, ...]] = field(default_factory=dict)
    routes: Mapping[Route, tuple[object, ...]] = field(default_factory=dict)
    unmovable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    taken: State = field(default_factory=dict)
    macs: Mapping[str, str] = field(default_factory=dict)
    dns: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    confirmed: frozenset[Confirmation] = frozenset()
    may_take: bool = False

    def addresses(self, nic: str) -> dict[str, CarriedAddress]:
        """The host's addresses that are on a NIC now."""
        return {
            carried.address: CarriedAddress.of(value)
            for carried, value in self.carried.items()
            if carried.device == nic
        }

    def moved(self, nic: str) -> dict[str, CarriedAddress]:
        """The addresses that were taken from a NIC."""
        return {
            resource.address: CarriedAddress.of(value)
            for resource, value in self.taken.items()
            if isinstance(resource, Carried) and resource.device == nic and isinstance(value, tuple)
        }

    def is_confirmed(self, nic: str) -> bool:
        """Whether all that would be taken from a NIC was confirmed before.

        Addresses with a lifetime do not count: they are others after every lease.
        """
        lasting = {address for address, how in self.addresses(nic).items() if how.valid is None}
        return any(row.mac == self.macs.get(nic) and lasting <= row.addresses for row in self.confirmed)

    def permits(self, nic: str) -> bool:
        """Whether addresses may be taken from a NIC now."""
        return self.may_take or self.is_confirmed(nic)


def desired(host: HostConfig, uplink: Link | None, network: HostNetwork) -> dict[Resource, Value]:
    """Addresses and routes of the host's interface, and what has to go from the uplink for them.

    In the order in which they are to be set, as far as ``rank`` leaves it open.
    """
    state: dict[Resource, Value] = {Address(host.interface, address): True for address in host.addresses}
    if uplink is not None:
        state |= _moved(host.interface, uplink, network)
    for route in host.routes:
        state[_route(route.to, route.via)] = _target(host.interface, route.to, route.via).as_value()
    return state


def _moved(interface: str, uplink: Link, network: HostNetwork) -> dict[Resource, Value]:
    nic = uplink.name
    addresses = network.moved(nic)
    routes = {
        resource: RouteTarget.of(value)
        for resource, value in network.taken.items()
        if isinstance(resource, Route) and isinstance(value, tuple)
    }
    if network.permits(nic):
        addresses |= network.addresses(nic)
        routes |= {route: RouteTarget.of(value) for route, value in network.routes.items()}
    state: dict[Resource, Value] = {}
    for address, how in addresses.items():
        state[Address(interface, address)] = "alone" if how.flags & NO_PREFIX_ROUTE else True
        state[Carried(nic, uplink.ifindex, address)] = None
    if addresses and nic in network.dns:
        state[LinkDns(interface)] = network.dns[nic]
    state |= {
        route: replace(target, device=interface).as_value()
        for route, target in routes.items()
        if target.device == nic
    }
    return state


def _route(to: str, via: str | None) -> Route:
    version = ipaddress.ip_address(via).version if to == "default" and via else _version(to)
    return Route(_network(to, via), MAIN_TABLE, IPV6_METRIC if version == 6 else 0, 0)


def _network(to: str, via: str | None) -> str:
    if to != "default":
        return to
    return _DEFAULTS[ipaddress.ip_address(via).version if via else 4]


def _version(to: str) -> int:
    return 4 if to == "default" else ipaddress.ip_network(to).version


def _target(interface: str, to: str, via: str | None) -> RouteTarget:
    ipv4 = ipaddress.ip_network(_network(to, via)).version == 4
    scope = SCOPE_LINK if ipv4 and via is None else SCOPE_UNIVERSE
    return RouteTarget(interface, via, None, PROTO_STATIC, scope)


def refusals(nic: str, host: HostConfig | None, network: HostNetwork, *, joined: bool) -> list[str]:
    """Why a NIC with what it carries must not be an uplink, or not without a host's interface.

    ``joined``: it is one already, and what was put on it since is no reason to take it out.
    """
    taken, here = network.moved(nic), network.addresses(nic)
    if taken and host is None:
        return [
            f"{nic} had the host's address {next(iter(taken))}, which would go back to a NIC that cannot "
            "serve it: keep `host:`, or take the whole switch out"
        ]
    if joined or taken or not here:
        return []
    first = next(iter(here))
    if host is None:
        return [
            f"{nic} carries the host's address {first}, which a bridge would cut off: add `host:` to the "
            f"switch, which takes it over, move it to another NIC, or `ip addr del {first} dev {nic}`"
        ]
    told = [
        f"{nic} has {reason}: put it right before the host's addresses can be taken over"
        for reason in network.unmovable.get(nic, ())
    ]
    if host.vlan is not None:
        told.append(
            f"{nic} carries the host's address {first} untagged, and `host:` is in VLAN {host.vlan}: "
            f"remove `vlan:` from `host:`, or `ip addr del {first} dev {nic}`"
        )
    if not network.permits(nic):
        told.append(
            f"{nic} carries the host's address {first}, and taking it over has to be confirmed: "
            "`offload apply FILE`, then `offload confirm`"
        )
    return told


def warnings(host: HostConfig, nic: str, network: HostNetwork) -> list[str]:
    """What the operator should know of the addresses that are, or would be, taken from a NIC."""
    told = []
    addresses = network.moved(nic) | network.addresses(nic)
    leased = [address for address, how in addresses.items() if how.valid is not None]
    if leased:
        told.append(
            f"{', '.join(leased)} has a lifetime (DHCP or router advertisement) and stays on "
            f"{host.interface} beyond it: let the client run on {host.interface}, not on {nic}"
        )
    unwritten = [address for address in addresses if address not in host.addresses]
    if unwritten:
        told.append(
            f"{host.interface} has {', '.join(unwritten)}, and its routes, from {nic} alone: after a reboot "
            f"only if somebody gives them to {nic} again; what shall stay belongs under `host:`"
        )
    return told


def all_warnings(config: Config, network: HostNetwork) -> list[str]:
    """``warnings`` for every uplink of ``config`` that the host shares."""
    return [
        warning
        for switch in config.switches.values()
        if switch.host and switch.uplink
        for warning in warnings(switch.host, switch.uplink, network)
    ]


def taking(changes: Iterable[Change]) -> dict[str, tuple[str, ...]]:
    """The addresses that a plan takes from each NIC."""
    found: dict[str, tuple[str, ...]] = {}
    for change in changes:
        if isinstance(change.resource, Carried) and change.after is None:
            nic = change.resource.device
            found[nic] = (*found.get(nic, ()), change.resource.address)
    return found


def shared(config: Config) -> set[str]:
    """The NICs that the host shares with a switch."""
    return {switch.uplink for switch in config.switches.values() if switch.host and switch.uplink}


def without(config: Config, nics: Collection[str]) -> Config:
    """``config`` without the switches on these NICs, and without their ports."""
    switches = {name: switch for name, switch in config.switches.items() if switch.uplink not in nics}
    ports = {name: port for name, port in config.ports.items() if port.switch in switches}
    return config.model_copy(update={"switches": switches, "ports": ports})


def rank(change: Change) -> int:
    """Which of several changes of one kind comes first: a smaller number.

    Addresses come in the order in which they were given, since the kernel deletes a primary one with
    its secondary ones, and a route to neighbours comes before one through a gateway. When they go it is
    the other way round.
    """
    value = change.before if change.after is None else change.after
    if not isinstance(value, tuple):
        return 0
    match change.resource:
        case Carried():
            late = CarriedAddress.of(value).place
        case Route():
            target = RouteTarget.of(value)
            late = int(target.via is not None or any(number == RTA_VIA for number, _ in target.attributes))
        case _:
            return 0
    return late if change.after is not None else -late
