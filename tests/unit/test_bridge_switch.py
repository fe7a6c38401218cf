"""The Python bridge's decisions: who gets a frame, what is learnt, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from offload.bridge.membership import FloodLimit, Member, Membership
from offload.bridge.switch import Switch

A, B, C, D, NOBODY = (f"02:00:00:00:00:0{digit}" for digit in "abcdf")
ALL = "ff:ff:ff:ff:ff:ff"
GROUP = "01:00:5e:00:00:01"
LLDP, LAST_LINK_LOCAL, PAST_LINK_LOCAL = (f"01:80:c2:00:00:{octet}" for octet in ("0e", "0f", "10"))


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def member(number: int, name: str, **more: Any) -> Member:
    settings: dict[str, Any] = {"vids": frozenset({0}), "learn": True, "flood": True}
    return Member(number, name, "port", **settings | more)


def switch_of(*members: Member, **more: Any) -> Switch:
    switch = Switch()
    switch.configure(Membership("ext0", "ext0-py", members, **more))
    return switch


def send(switch: Switch, number: int, dst: str, src: str, vid: int = 0, now: float = 100.0) -> list[str]:
    """Names of the members that get a frame which comes from one with this id, in one of its VLANs."""
    port = switch.ports[number]
    return [target.name for target in switch.forward(port, port.vlans[vid], octets(dst), octets(src), now)]


def drops(switch: Switch) -> dict[str, dict[str, int]]:
    """By member, those that have any."""
    return {port.name: dict(port.drops) for port in switch.ports.values() if port.drops}


TRIO = (member(1, "a"), member(2, "b"), member(3, "c", flood=False))

DESTINATIONS = [
    pytest.param(ALL, ["b", "c"], {}, id="broadcast to all"),
    pytest.param(GROUP, ["b", "c"], {}, id="multicast to all"),
    pytest.param(NOBODY, ["b"], {}, id="unknown to those that are flooded to"),
    pytest.param(LLDP, [], {"a": {"link_local": 1}}, id="link-local to nobody"),
    pytest.param(LAST_LINK_LOCAL, [], {"a": {"link_local": 1}}, id="0f is link-local"),
    pytest.param(PAST_LINK_LOCAL, ["b", "c"], {}, id="10 is not"),
    pytest.param(A, [], {"a": {"same_port": 1}}, id="its own address to nobody"),
]


@pytest.mark.parametrize(("dst", "expected", "counted"), DESTINATIONS)
def test_where_a_frame_goes(dst: str, expected: Sequence[str], counted: dict[str, dict[str, int]]) -> None:
    switch = switch_of(*TRIO)
    assert send(switch, 1, dst, A) == expected
    assert drops(switch) == counted


def test_what_was_learnt_is_not_flooded() -> None:
    switch = switch_of(*TRIO)
    send(switch, 3, ALL, C)
    assert send(switch, 1, C, A) == ["c"]
    assert send(switch, 2, A, B) == ["a"]


def test_link_local_stays_among_those_that_may() -> None:
    switch = switch_of(member(1, "a", link_local=True), member(2, "b", link_local=True), member(3, "c"))
    assert send(switch, 1, LLDP, A) == ["b"]
    assert send(switch, 3, LLDP, C) == []


def test_a_station_that_moves_is_found_where_it_sent_last() -> None:
    switch = switch_of(*TRIO)
    send(switch, 2, ALL, D)
    assert send(switch, 1, D, A) == ["b"]
    send(switch, 3, ALL, D)
    assert send(switch, 1, D, A) == ["c"]
    assert {(item.mac, item.member) for item in switch.stations(100.0)} == {(D, "c"), (A, "a")}


def test_a_station_that_moves_gives_its_place_in_the_table_back() -> None:
    switch = switch_of(*TRIO, stations=1)
    for number in (1, 2, 1, 2):
        send(switch, number, ALL, D)
    assert [switch.ports[number].learnt for number in (1, 2)] == [0, 1]
    send(switch, 1, ALL, A)
    assert {(item.mac, item.member) for item in switch.stations(100.0)} == {(D, "b"), (A, "a")}


def test_a_declared_address_never_ages() -> None:
    switch = switch_of(member(1, "a"), member(2, "b", learn=False, macs=(B,)))
    switch.age(1e9)
    assert send(switch, 1, B, A) == ["b"]
    assert [(item.mac, item.age) for item in switch.stations(100.0)] == [(B, None), (A, 0.0)]


def test_a_declared_address_moves_to_where_it_is_heard() -> None:
    """A VM that went to another host is heard from the wire before the controller says so."""
    switch = switch_of(member(1, "wire"), member(2, "b", macs=(B,)), member(3, "c"))
    assert send(switch, 3, B, C) == ["b"]
    send(switch, 1, ALL, B)
    assert send(switch, 3, B, C) == ["wire"]
    send(switch, 2, ALL, B)
    assert send(switch, 3, B, C) == ["b"]


@pytest.mark.parametrize(("after", "known"), [(299.0, True), (301.0, False)], ids=["before", "after"])
def test_a_silent_station_is_forgotten_after_its_time(after: float, known: bool) -> None:
    switch = switch_of(*TRIO)
    send(switch, 3, ALL, C, now=100.0)
    switch.age(100.0 + after)
    assert send(switch, 1, C, A, now=100.0 + after) == (["c"] if known else ["b"])
    assert switch.ports[3].learnt == known


def test_a_station_that_sends_is_not_forgotten() -> None:
    switch = switch_of(*TRIO)
    for now in (100.0, 350.0):
        send(switch, 3, ALL, C, now=now)
    switch.age(600.0)
    assert send(switch, 1, C, A, now=600.0) == ["c"]


def test_who_does_not_learn_teaches_nothing() -> None:
    switch = switch_of(member(1, "a", learn=False), member(2, "b"))
    send(switch, 1, ALL, A)
    assert list(switch.stations(100.0)) == []


def test_a_group_address_as_source_is_not_learnt() -> None:
    switch = switch_of(*TRIO)
    send(switch, 1, ALL, GROUP)
    assert list(switch.stations(100.0)) == []


def test_vlans_have_nothing_to_do_with_each_other() -> None:
    both = frozenset({10, 20})
    switch = switch_of(
        member(1, "a", vids=both), member(2, "b", vids=both), member(3, "c", vids=frozenset({10}))
    )
    assert send(switch, 1, ALL, A, vid=10) == ["b", "c"]
    assert send(switch, 1, ALL, A, vid=20) == ["b"]
    send(switch, 2, ALL, C, vid=20)
    send(switch, 3, ALL, C, vid=10)
    assert send(switch, 1, C, A, vid=10) == ["c"]
    assert send(switch, 1, C, A, vid=20) == ["b"]
    assert 0 not in switch.ports[1].vlans


def test_nobody_else_is_a_drop_of_its_own() -> None:
    switch = switch_of(member(1, "a"), member(2, "b", vids=frozenset({10})))
    assert send(switch, 1, ALL, A) == []
    assert drops(switch) == {"a": {"nowhere": 1}}


def test_flooding_is_limited_per_member_and_known_unicast_is_not() -> None:
    switch = switch_of(*TRIO, flood_limit=FloodLimit(rate=10, burst=3))
    send(switch, 2, ALL, B)
    assert [bool(send(switch, 1, ALL, A)) for _ in range(5)] == [True, True, True, False, False]
    assert send(switch, 1, B, A) == ["b"]
    assert send(switch, 2, ALL, B) == ["a", "c"], "another member's flooding is its own"
    assert [bool(send(switch, 1, NOBODY, A, now=100.15)) for _ in range(2)] == [True, False]
    assert drops(switch) == {"a": {"flood_limit": 3}}
    assert [bool(send(switch, 1, ALL, A, now=1e6)) for _ in range(4)] == [True, True, True, False]


def test_a_new_membership_does_not_refill_the_flood_limit() -> None:
    limit = FloodLimit(rate=10, burst=3)
    switch = switch_of(*TRIO, flood_limit=limit)
    for _ in range(3):
        assert send(switch, 1, ALL, A)
    switch.configure(Membership("ext0", "ext0-py", TRIO, flood_limit=limit))
    assert send(switch, 1, ALL, A) == []


def test_a_member_fills_only_its_own_part_of_the_table() -> None:
    switch = switch_of(*TRIO, stations=2)
    for number in range(5):
        send(switch, 1, ALL, f"02:00:00:00:01:0{number}")
    send(switch, 2, ALL, B)
    assert [item.member for item in switch.stations(100.0)] == ["a", "a", "b"]
    assert drops(switch) == {"a": {"station_limit": 3}}
    send(switch, 1, ALL, B)
    assert send(switch, 3, B, C) == ["a", "b"], "it is not at b any more, and a is full"
    switch.age(1e6)
    send(switch, 1, ALL, A, now=1e6)
    assert [item.mac for item in switch.stations(1e6)] == [A], "what was forgotten gives room"


@pytest.mark.parametrize(
    ("to", "expected", "reason"),
    [("b", ["b"], None), ("a", [], "same_port"), ("c", [], "vlan"), ("zz", [], "nowhere")],
    ids=["a member", "where it came from", "not in the VLAN", "nobody"],
)
def test_a_redirect_keeps_to_the_vlan(to: str, expected: list[str], reason: str | None) -> None:
    switch = switch_of(member(1, "a"), member(2, "b", flood=False), member(3, "c", vids=frozenset({10})))
    port = switch.ports[1]
    assert [target.name for target in switch.redirect(port, port.vlans[0], to)] == expected
    assert drops(switch) == ({"a": {reason: 1}} if reason else {})


def test_who_stays_keeps_counters_and_stations() -> None:
    switch = switch_of(*TRIO)
    for number, mac in ((1, A), (2, B), (3, C)):
        send(switch, number, ALL, mac)
    switch.ports[1].rx_packets = switch.ports[2].rx_packets = 7
    switch.configure(
        Membership(
            "ext0", "ext0-py", (member(1, "a"), member(9, "b"), member(3, "c", learn=False), member(2, "d"))
        )
    )
    assert [(port.name, port.rx_packets) for port in switch.ports.values()] == [
        ("a", 7), ("b", 0), ("c", 0), ("d", 0)
    ]  # fmt: skip
    assert {(item.mac, item.member) for item in switch.stations(100.0)} == {(A, "a"), (B, "b")}
    assert send(switch, 1, B, A) == ["b"]


def test_who_leaves_a_vlan_is_not_reached_there() -> None:
    switch = switch_of(member(1, "a"), member(2, "b", vids=frozenset({0, 10})))
    send(switch, 2, ALL, B)
    switch.configure(Membership("ext0", "ext0-py", (member(1, "a"), member(2, "b", vids=frozenset({10})))))
    assert send(switch, 1, B, A) == []


def test_a_declaration_takes_an_address_from_who_had_learnt_it() -> None:
    switch = switch_of(*TRIO)
    send(switch, 1, ALL, D)
    switch.configure(Membership("ext0", "ext0-py", (*TRIO[:2], replace(TRIO[2], macs=(D,)))))
    assert send(switch, 2, D, B) == ["c"]
    assert switch.ports[1].learnt == 0
