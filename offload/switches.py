"""What a switch and its devices shall be: VLANs, bridge, programs and addresses. Pure.

``plan.desire`` decides which switches and ports there are; what it takes for a device to
belong to one is said here, and is the same for a VM's port, for the host and for the wire.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .config import Config, SwitchConfig, VlanMode, conduit_inner
from .model import (
    Bridge,
    BridgePort,
    BridgeVlans,
    Conduit,
    Fdb,
    Ipv6Disabled,
    Link,
    Master,
    Member,
    MemberRow,
    Network,
    Resource,
    Station,
    StationRow,
    StationState,
    Trunk,
    Value,
)

MAX_STATIC_VIDS = 64
"""Up to so many VIDs of a port the bridge is told each of its addresses; with more it floods and learns."""

LINK_LOCAL = 0xFFFD
"""Link-local group addresses that a bridge can let through: all but 01, PAUSE (net/bridge/br_private.h)."""

LAST_VID = 4094

At = tuple[str, int]
"""A device: its name and ifindex, 0 while it is still to be made."""


@dataclass(frozen=True)
class Switch:
    """A switch of the config and what was decided about it.

    ``nic`` is its uplink if that can be used. ``filters_vlans`` says whether its bridge does;
    ``untagged`` is then the VID that it keeps untagged frames in, otherwise 0. ``vids``
    are those of its ports and its host, 0 for untagged ones.
    """

    name: str
    config: SwitchConfig
    number: int
    nic: str | None
    filters_vlans: bool
    untagged: int
    vids: frozenset[int]
    asks_bridge: bool
    link_local: bool

    @property
    def python(self) -> bool:
        return self.config.bridge == "python"

    def bridge_vid(self, vid: int) -> int:
        """The VID that frames of ``vid`` have inside a kernel bridge."""
        return (vid or self.untagged) if self.filters_vlans else 0


def decided(name: str, config: Config, number: int, nic: str | None, kernel_filters_vlans: bool) -> Switch:
    """The switch ``name`` of ``config``."""
    switch = config.switches[name]
    ports = [port for port in config.ports.values() if port.switch == name]
    vids = {vid for port in ports for vid in port.vlan.vids}
    if switch.host:
        vids.add(switch.host.vlan or 0)
    filters = kernel_filters_vlans and switch.bridge == "kernel"
    return Switch(
        name=name,
        config=switch,
        number=number,
        nic=nic,
        filters_vlans=filters,
        untagged=_unused_vid(vids) if filters else 0,
        vids=frozenset(vids),
        asks_bridge=any(port.allow.mac_spoofing for port in ports),
        link_local=any(port.allow.link_local_protocols for port in ports),
    )


def _unused_vid(vids: Collection[int]) -> int:
    """The highest VID that nobody uses, 0 when there is none."""
    return next((vid for vid in range(LAST_VID, 0, -1) if vid not in vids), 0)


def standing(
    switch: Switch, links: Mapping[str, Link], uplink_id: int | None, digest: str
) -> dict[Resource, Value]:
    """The switch itself, without any port."""
    conduit = switch.name if switch.python else None
    state: dict[Resource, Value] = {
        Network(switch.number): (switch.name, uplink_id, conduit, switch.untagged, switch.asks_bridge)
    }
    if switch.python:
        inner = conduit_inner(switch.name)
        state[Conduit(switch.name, inner)] = True
        state |= _programs(switch.name, MemberRow(0, switch.number, "conduit"), links, digest)
        state |= _programs(inner, MemberRow(0, 0, "silent"), links, digest)
    else:
        state[Bridge(switch.name)] = "vlan" if switch.filters_vlans else "plain"
        state |= _programs(switch.name, MemberRow(0, 0, "silent"), links, digest)
    return state


def _programs(device: str, row: MemberRow, links: Mapping[str, Link], digest: str) -> dict[Resource, Value]:
    link = links.get(device)
    return {Member(device, link.ifindex): row.as_value(digest)} if link else {}


def joined(
    switch: Switch,
    at: At,
    row: MemberRow,
    mode: VlanMode,
    stations: Mapping[str, StationState],
    digest: str,
) -> dict[Resource, Value]:
    """A port's or the host's device in the switch. ``stations``: its addresses, and where each one is."""
    spoofing = "mac_spoofing" in row.allow
    state: dict[Resource, Value] = {
        Ipv6Disabled(*at): True,
        Member(*at): row.as_value(digest),
    }
    if mode.trunk:
        state[Trunk(row.port)] = tuple(sorted(mode.trunk))
    state |= {
        Station(switch.number, mac, vid): (row.port, at[1], where)
        for mac, where in stations.items()
        for vid in mode.vids
    }
    if switch.python:
        return state
    state[Master(*at)] = switch.name
    told = len(mode.vids) <= MAX_STATIC_VIDS
    flood = spoofing or not told or "expected" in stations.values()
    state[BridgePort(*at)] = (True, flood, LINK_LOCAL if "link_local_protocols" in row.allow else 0)
    if switch.filters_vlans:
        untagged = switch.untagged if 0 in mode.vids else 0
        state[BridgeVlans(*at)] = (untagged, tuple(vid for vid in mode.vids if vid))
    if told:
        state |= {
            Fdb(*at, mac, switch.bridge_vid(vid)): True
            for mac, where in stations.items()
            if where == "here"
            for vid in mode.vids
        }
    return state


def wired(switch: Switch, at: At, row: MemberRow, digest: str) -> dict[Resource, Value]:
    """The NIC in the switch."""
    state: dict[Resource, Value] = {Ipv6Disabled(*at): True, Member(*at): row.as_value(digest)}
    if switch.python:
        return state
    state[Master(*at)] = switch.name
    state[BridgePort(*at)] = (True, True, LINK_LOCAL if switch.link_local else 0)
    if switch.filters_vlans:
        state[BridgeVlans(*at)] = (switch.untagged, tuple(sorted(switch.vids - {0})))
    return state


def where(
    switch: Switch,
    macs: Iterable[str],
    mode: VlanMode,
    port_id: int,
    ifindex: int,
    stations: Mapping[tuple[int, str, int], StationRow],
) -> dict[str, StationState]:
    """Where each address of a port is: what was heard of it last, in whichever VLAN.

    A device that was made anew has not been heard yet, whatever its predecessor was.
    """
    found: dict[str, StationState] = {}
    for mac in macs:
        rows = [stations.get((switch.number, mac, vid)) for vid in mode.vids]
        heard = [row for row in rows if row and (row.port, row.ifindex) == (port_id, ifindex)]
        newest = max(heard, key=lambda row: row.since, default=None)
        found[mac] = newest.state if newest else "expected"
    return found


def listed(
    port_id: int,
    name: str,
    role: str,
    vids: Iterable[int],
    stations: Mapping[str, StationState],
    *,
    flood: bool,
    link_local: bool,
) -> tuple[object, ...]:
    """A device as the Python bridge is told of it: one entry of a ``Roster``."""
    here = tuple(mac for mac, where in stations.items() if where == "here")
    return (port_id, name, role, tuple(sorted(vids)), flood, here, link_local)
