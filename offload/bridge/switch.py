"""A VLAN-aware learning switch: which members a frame goes to. Pure: time is given, frames are not touched.

The decisions, in order: the member must be in the frame's VLAN; its source is learnt; a group address goes
to every other member of the VLAN, link-local ones only between members that may speak them; a known address
goes to its member; an unknown one to every other member that is flooded to. A frame never goes back where
it came from, and one that goes to several uses up the flood limit of where it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from offload.bridge.membership import FloodLimit, Member, Membership
from offload.bridge.state import MemberState, StationState

_LINK_LOCAL = bytes.fromhex("0180c20000")  # IEEE 802.1Q, table 8-1: with one octet from 00 to 0f
FOREVER = float("inf")


class Port:
    """A member at work. ``vlans`` are those it is in; the counters are of ``MemberState``."""

    __slots__ = (
        "alone",
        "drops",
        "filled",
        "id",
        "learn",
        "learnt",
        "member",
        "name",
        "rx_bytes",
        "rx_packets",
        "tokens",
        "tx_bytes",
        "tx_packets",
        "vlans",
    )

    def __init__(self, member: Member) -> None:
        self.member = member
        self.id = member.id
        self.name = member.name
        self.learn = member.learn
        self.vlans: dict[int, Vlan] = {}
        self.alone = (self,)
        self.learnt = 0
        self.tokens = self.filled = 0.0
        self.rx_packets = self.rx_bytes = self.tx_packets = self.tx_bytes = 0
        self.drops: Counter[str] = Counter()

    def state(self) -> MemberState:
        return MemberState(
            *(self.id, self.name, self.rx_packets, self.rx_bytes, self.tx_packets, self.tx_bytes),
            drops=dict(self.drops),
        )

    def go_on(self, before: MemberState) -> None:
        """Count on from here."""
        self.rx_packets, self.rx_bytes = before.rx_packets, before.rx_bytes
        self.tx_packets, self.tx_bytes = before.tx_packets, before.tx_bytes
        self.drops = Counter(before.drops)


class Station:
    """Where an address is. ``seen`` is when it last sent, ``FOREVER`` where it is declared to be."""

    __slots__ = ("port", "seen")

    def __init__(self, port: Port, seen: float) -> None:
        self.port = port
        self.seen = seen


class Vlan:
    """One VLAN: its stations by address, its members, and those of them that unknown unicast goes to."""

    __slots__ = ("flooded", "ports", "stations", "vid")

    def __init__(self, vid: int) -> None:
        self.vid = vid
        self.stations: dict[bytes, Station] = {}
        self.ports: list[Port] = []
        self.flooded: list[Port] = []


class Switch:
    """The members and what was learnt of them."""

    def __init__(self) -> None:
        self.ports: dict[int, Port] = {}
        """Members by their id."""
        self._by_name: dict[str, Port] = {}
        self._vlans: dict[int, Vlan] = {}
        self._limit = FloodLimit()
        self._ageing = Membership.ageing
        self._most = Membership.stations

    def configure(self, membership: Membership) -> None:
        """Take these members. Who stays, by id and name, keeps counters and what was learnt behind it."""
        before, vlans_before = self._by_name, self._vlans
        self._limit = membership.flood_limit
        self._ageing = membership.ageing
        self._most = membership.stations
        self._vlans = {}
        self.ports = {}
        self._by_name = {}
        for member in membership.members:
            port = Port(member)
            port.tokens = membership.flood_limit.burst
            old = before.get(member.name)
            if old is not None and old.id == member.id:
                port.go_on(old.state())
                port.tokens, port.filled = old.tokens, old.filled
            self.ports[port.id] = self._by_name[port.name] = port
            for vid in member.vids:
                vlan = port.vlans[vid] = self._vlans.setdefault(vid, Vlan(vid))
                vlan.ports.append(port)
                if member.flood:
                    vlan.flooded.append(port)
                for address in member.macs:
                    vlan.stations[bytes.fromhex(address.replace(":", ""))] = Station(port, FOREVER)
        for vid, vlan in vlans_before.items():
            for mac, station in vlan.stations.items():
                if station.seen != FOREVER:
                    self.learn(vid, mac, station.port.name, station.seen)

    def learn(self, vid: int, mac: bytes, member: str, seen: float) -> None:
        """Take an address for known, if the member may learn it and it is not known yet."""
        port = self._by_name.get(member)
        vlan = port.vlans.get(vid) if port is not None and port.learn else None
        if port is not None and vlan is not None and mac not in vlan.stations and port.learnt < self._most:
            vlan.stations[mac] = Station(port, seen)
            port.learnt += 1

    def by_name(self, name: str) -> Port | None:
        return self._by_name.get(name)

    def forward(self, port: Port, vlan: Vlan, dst: bytes, src: bytes, now: float) -> Sequence[Port]:
        """Whom a frame goes to that came from ``port`` in ``vlan``, one of its own.

        Counts a reason when that is nobody. ``dst`` and ``src`` are six octets;
        ``now`` is in seconds of a clock that never goes back.
        """
        stations = vlan.stations
        if port.learn:
            station = stations.get(src)
            if station is not None and station.port is port:
                if station.seen != FOREVER:
                    station.seen = now
            else:
                self._learn(port, stations, src, station, now)
        if not dst[0] & 1:
            station = stations.get(dst)
            if station is not None:
                if station.port is not port:
                    return station.port.alone
                port.drops["same_port"] += 1
                return ()
            targets = [other for other in vlan.flooded if other is not port]
        elif dst[:5] == _LINK_LOCAL and dst[5] < 16:
            if not port.member.link_local:
                port.drops["link_local"] += 1
                return ()
            targets = [other for other in vlan.ports if other.member.link_local and other is not port]
        else:
            targets = [other for other in vlan.ports if other is not port]
        if not targets:
            port.drops["nowhere"] += 1
            return ()
        if not self._may_flood(port, now):
            port.drops["flood_limit"] += 1
            return ()
        return targets

    def redirect(self, port: Port, vlan: Vlan, member: str) -> Sequence[Port]:
        """The one whom an extension chose, if it is in the VLAN and not where the frame came from."""
        target = self._by_name.get(member)
        if target is None or vlan.vid not in target.vlans:
            port.drops["vlan" if target else "nowhere"] += 1
            return ()
        if target is port:
            port.drops["same_port"] += 1
            return ()
        return target.alone

    def age(self, now: float) -> None:
        """Forget who has not sent anything for the ageing time."""
        oldest = now - self._ageing
        for vlan in self._vlans.values():
            for mac in [mac for mac, station in vlan.stations.items() if station.seen < oldest]:
                vlan.stations.pop(mac).port.learnt -= 1

    def stations(self, now: float) -> Iterator[StationState]:
        """Every address that is known at this moment; it may be read while the switch learns on."""
        known = [(vlan.vid, list(vlan.stations.items())) for vlan in self._vlans.values()]
        for vid, stations in known:
            for mac, station in stations:
                age = None if station.seen == FOREVER else round(max(0.0, now - station.seen), 1)
                yield StationState(mac.hex(":"), vid, station.port.name, age)

    def _learn(
        self, port: Port, stations: dict[bytes, Station], src: bytes, station: Station | None, now: float
    ) -> None:
        if src[0] & 1:
            return
        if station is not None:
            # A declared address moves as well: its VM has gone to another host, or come back.
            station.port.learnt -= station.seen != FOREVER
            del stations[src]
        if port.learnt >= self._most:
            port.drops["station_limit"] += 1
            return
        stations[src] = Station(port, now)
        port.learnt += 1

    def _may_flood(self, port: Port, now: float) -> bool:
        limit = self._limit
        port.tokens = min(limit.burst, port.tokens + (now - port.filled) * limit.rate)
        port.filled = now
        if port.tokens < 1:
            return False
        port.tokens -= 1
        return True
