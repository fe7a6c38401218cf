"""After every step of a change each frame reaches whom it is for, and nobody else. Pure, no privileges.

A change is many steps, and the daemon may stand still between two of them. So the walk of a frame, from the
wire or to it, as ``bpf/vmq.c`` and ``bpf/switch.c`` have it, is followed through the state after each step.
Kernel bridges only: a Python bridge is told of all its members at once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.config import Config, parse
from offload.errors import ConfigError
from offload.model import (
    Bridge,
    BridgePort,
    BridgeVlans,
    Change,
    Fdb,
    Filter,
    Master,
    Member,
    MemberRow,
    Network,
    PortRecord,
    PortSlot,
    Resource,
    State,
    Station,
    Trunk,
    Uplink,
    Value,
)
from offload.plan import BYPASS, RUNNING, Facts, desire, difference
from tests.unit.test_again import DEVICES, HOST, heard, settled

NIC = ("eth1", 2)
MACS = [f"02:15:5d:00:00:0{number}" for number in range(1, 5)]
VIDS = (0, 7, 8)
PORTS = st.fixed_dictionaries(
    {
        "switch": st.sampled_from(["ext0", "ext0", "lan0"]),
        "mac": st.lists(st.sampled_from(MACS), min_size=1, max_size=2, unique=True),
    },
    optional={
        "queue": st.just("off"),
        "vlan": st.sampled_from([7, 8, {"trunk": [7, 8]}, {"trunk": [7], "native": 0}]),
        "cpu": st.sampled_from([0, 1]),
        "allow": st.just({"mac_spoofing": True}),
    },
)
CONFIGS = st.dictionaries(st.sampled_from(["web1", "web2", "web3"]), PORTS)


def config_of(ports: dict[str, dict[str, Any]]) -> Config | None:
    """``None`` where addresses clash."""
    whole = {
        "version": 1,
        "nics": {"eth1": {}},
        "switches": {"ext0": {"type": "external", "uplink": "eth1"}, "lan0": {"type": "private"}},
        "ports": {name: {**port, "device": name} for name, port in ports.items()},
    }
    try:
        return parse(json.dumps(whole))  # JSON is YAML
    except ConfigError:
        return None


def as_it_is(facts: Facts) -> Facts:
    return facts


class Walk:
    """Where frames go in one state. VID 0: untagged."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._slots = {
            resource.port_id: PortRecord.of(value)
            for resource, value in state.items()
            if isinstance(resource, PortSlot) and isinstance(value, tuple)
        }

    def unicast(self, mac: str, vid: int) -> set[str]:
        """The devices that a frame from the wire reaches."""
        if Uplink(*NIC) in self._state:
            port_id = self._state.get(Filter(*NIC, mac, vid))
            slot = self._slots.get(port_id) if isinstance(port_id, int) else None
            if slot and slot.flags & RUNNING and slot.ifindex:
                return {device for device, link in DEVICES.items() if link.ifindex == slot.ifindex}
        return set(self._bridged(mac, vid))

    def broadcast(self, vid: int) -> set[str]:
        return set(self._bridged(None, vid))

    def sent(self, name: str, src: str, tag: int) -> int | None:
        """The VID on the wire of a frame that a VM sends to somebody there; ``None``: it gets nowhere."""
        at = (name, DEVICES[name].ifindex)
        bridge = self._state.get(Master(*at))
        bridged = bridge is not None and bridge == self._state.get(Master(*NIC))
        value = self._state.get(Member(*at))
        if not isinstance(value, tuple):
            return tag if bridged else None  # unguarded
        row = MemberRow.of(value)
        network = self._state.get(Network(row.network))
        if not isinstance(network, tuple) or not (tag in self._trunk(row) if tag else row.pvid is not None):
            return None
        vid = tag or row.pvid or 0
        station = self._state.get(Station(row.network, src, vid))
        own = isinstance(station, tuple) and station[0] == row.port
        if not own and "mac_spoofing" not in row.allow:
            return None
        _, uplink, _, untagged, asks_bridge = network
        slot = self._slots.get(uplink) if isinstance(uplink, int) else None
        if row.bypass and not asks_bridge and slot and slot.flags & BYPASS and slot.ifindex:
            return vid
        inside = vid or untagged
        return vid if bridged and isinstance(inside, int) and self._carries(str(bridge), at, inside) else None

    def _bridged(self, mac: str | None, vid: int) -> Iterator[str]:
        bridge = self._state.get(Master(*NIC))
        tag = self._tag(vid)
        if not isinstance(bridge, str) or tag is None:
            return
        inside = [
            name
            for name, link in DEVICES.items()
            if self._state.get(Master(name, link.ifindex)) == bridge
            and self._carries(bridge, (name, link.ifindex), tag)
        ]
        known = [name for name in inside if mac and Fdb(name, DEVICES[name].ifindex, mac, tag) in self._state]
        for name in known or inside:
            floods = self._state.get(BridgePort(name, DEVICES[name].ifindex), (True, True, 0))
            assert isinstance(floods, tuple)
            if (known or not mac or floods[1]) and self._lets_in(name, mac, vid):
                yield name

    def _tag(self, vid: int) -> int | None:
        """The VID inside the bridge; ``None``: `wire` drops it."""
        member = self._state.get(Member(*NIC))
        if not isinstance(member, tuple):
            return vid
        network = self._state.get(Network(MemberRow.of(member).network))
        if not isinstance(network, tuple):
            return None
        untagged = network[3]
        assert isinstance(untagged, int)
        return None if vid and vid == untagged else vid or untagged

    def _carries(self, bridge: str, at: tuple[str, int], tag: int) -> bool:
        if self._state.get(Bridge(bridge)) != "vlan":
            return True
        return all(tag in self._vids(BridgeVlans(*device)) for device in (NIC, at))

    def _vids(self, vlans: BridgeVlans) -> tuple[object, ...]:
        match self._state.get(vlans):
            case untagged, tuple(tagged):
                return (untagged, *tagged)
        return ()

    def _lets_in(self, name: str, mac: str | None, vid: int) -> bool:
        """What `guard` decides; without it everything passes."""
        ifindex = DEVICES[name].ifindex
        value = self._state.get(Member(name, ifindex))
        if not isinstance(value, tuple):
            return True
        row = MemberRow.of(value)
        if vid != row.pvid and vid not in self._trunk(row):
            return False
        if mac is None:
            return True
        station = self._state.get(Station(row.network, mac, vid))
        if "mac_spoofing" in row.allow:
            return not isinstance(station, tuple) or station[0] == row.port
        return isinstance(station, tuple) and station[0] == row.port and station[2] != "away"

    def _trunk(self, row: MemberRow) -> tuple[object, ...]:
        vids = self._state.get(Trunk(row.port)) if row.trunk else ()
        return vids if isinstance(vids, tuple) else ()


def after_each(state: State, steps: tuple[Change, ...]) -> Iterator[State]:
    """The state before the first step, and after each. Who leaves a bridge leaves all that it had there."""
    now: dict[Resource, Value] = dict(state)
    yield now
    for step in steps:
        if step.after is not None:
            now[step.resource] = step.after
            yield now
            continue
        now.pop(step.resource, None)
        if isinstance(step.resource, Master):
            left = step.resource.ifindex
            there = (BridgePort, BridgeVlans, Fdb)
            now = {key: now[key] for key in now if not (isinstance(key, there) and key.ifindex == left)}
        yield now


def members(config: Config, vid: int) -> set[str]:
    """The devices at the wire that are in a VLAN."""
    return {name for name, port in config.ports.items() if port.switch == "ext0" and vid in port.vlan.vids}


def owners(config: Config, mac: str, vid: int) -> set[str]:
    return {name for name in members(config, vid) if mac in config.ports[name].mac}


def gets_the_same(old: Config, new: Config, vid: int) -> set[str]:
    """The devices that frames of a VLAN go to before and after, with a tag or without one as before."""
    return {
        name
        for name in members(old, vid) & members(new, vid)
        if (vid == old.ports[name].vlan.native) == (vid == new.ports[name].vlan.native)
    }


def spoofers(config: Config, vid: int) -> set[str]:
    return {name for name in members(config, vid) if config.ports[name].allow.mac_spoofing}


def may_send(config: Config, name: str, src: str, tag: int) -> int | None:
    """The VID on the wire of what a VM sends."""
    port = config.ports.get(name)
    if not port or port.switch != "ext0" or not (src in port.mac or port.allow.mac_spoofing):
        return None
    if not tag:
        return port.vlan.native
    return tag if tag in port.vlan.trunk else None


def why_it_may(config: Config, name: str, src: str) -> str:
    return "its own" if name in config.ports and src in config.ports[name].mac else "spoofing"


@given(CONFIGS, CONFIGS, st.sampled_from([as_it_is, heard]))
@settings(max_examples=400)
def test_every_step_keeps_frames_coming_and_apart(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], news: Callable[[Facts], Facts]
) -> None:
    old, new = config_of(before), config_of(after)
    if not old or not new:
        return
    facts, desired = settled(old, HOST)
    wanted = desire(new, news(facts))
    if desired.refusals or wanted.refusals:
        return
    originals: State = {resource: None for resource in desired.state if isinstance(resource, Master)}
    for state in after_each(desired.state, difference(desired.state, wanted.state, originals)):
        walk = Walk(state)
        for vid in VIDS:
            same = gets_the_same(old, new, vid)
            assert same <= walk.broadcast(vid) <= members(old, vid) | members(new, vid)
            for mac in MACS:
                was, shall = owners(old, mac, vid), owners(new, mac, vid)
                reached = walk.unicast(mac, vid)
                of_nobody = not (was and shall)  # before or after
                asked = spoofers(old, vid) | spoofers(new, vid) if of_nobody else set()
                assert reached <= was | shall | asked
                assert reached >= was & shall & same
        for name, src, tag in itertools.product(DEVICES, MACS, VIDS):
            may, shall_be = may_send(old, name, src, tag), may_send(new, name, src, tag)
            sent = walk.sent(name, src, tag)
            stays = may == shall_be and why_it_may(old, name, src) == why_it_may(new, name, src)
            assert sent in (may, shall_be) or (sent is None and not stays)
    assert wanted.state.items() <= state.items()
