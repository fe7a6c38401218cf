"""What the matrix test judges by: the rules of a switch, and the choice among combinations. No root."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.netns.matrix.cells import every, sending_of, some, topology, uses_vlans
from tests.netns.matrix.oracle import TPID_8021AD, UNTAGGED, WIRE, End, Frame, Mode, Tag, who_gets
from tests.netns.matrix.pairwise import pairwise

ALL = "ff:ff:ff:ff:ff:ff"
LLDP = "01:80:c2:00:00:0e"
NOBODY = "02:15:5d:ff:ff:ff"
MAC = {name: f"02:15:5d:00:00:{number:02x}" for number, name in enumerate("uvabtnhsl")}
TRUNK, NATIVE = Mode(None, frozenset({10, 20})), Mode(20, frozenset({10}))


def vm(name: str, mode: Mode = UNTAGGED) -> End:
    return End(name, "vm", mode, frozenset({MAC[name]}))


PLAIN = (vm("u"), vm("v"), vm("a", Mode(10)), vm("b", Mode(20)), vm("t", TRUNK), vm("n", NATIVE))
HOST = End("h", "host", Mode(10), frozenset({MAC["h"]}))
CABLE = End("w", "wire", WIRE)
OTHER = (End("elsewhere", "vm", Mode(), frozenset({NOBODY})), End("x", "wire", WIRE))
SWITCH = {"here": (*PLAIN, HOST, CABLE), "there": OTHER}

TO_U, TO_A, TO_T, TO_H = (MAC[name] for name in "uath")
CASES = [
    # sender, destination, tags, and who gets it with which tags
    pytest.param("v", TO_U, (), {"u": ()}, id="unicast-to-its-owner-alone"),
    pytest.param("v", ALL, (), {"u": (), "w": ()}, id="broadcast-to-the-others-of-the-untagged-network"),
    pytest.param("u", TO_U, (), {}, id="to-oneself"),
    pytest.param("u", NOBODY, (), {"w": ()}, id="unknown-out-to-the-wire-and-not-to-another-switch"),
    pytest.param("w", NOBODY, (), {}, id="unknown-from-the-wire-to-nobody"),
    pytest.param("v", TO_A, (), {"w": ()}, id="an-address-of-another-vlan-is-unknown"),
    pytest.param("a", ALL, (), {"t": (Tag(10),), "n": (Tag(10),), "h": (), "w": (Tag(10),)}, id="a-vlan"),
    pytest.param("b", ALL, (), {"t": (Tag(20),), "n": (), "w": (Tag(20),)}, id="a-vlan-native-to-a-trunk"),
    pytest.param("n", ALL, (), {"b": (), "t": (Tag(20),), "w": (Tag(20),)}, id="from-a-native-vlan"),
    pytest.param("t", TO_A, (Tag(10, pcp=5),), {"a": ()}, id="from-a-trunk"),
    pytest.param("t", TO_A, (Tag(20),), {"w": (Tag(20),)}, id="from-a-trunk-in-another-vlan"),
    pytest.param("t", ALL, (Tag(30),), {}, id="a-vlan-that-the-trunk-has-not"),
    pytest.param("t", ALL, (), {}, id="untagged-from-a-trunk-without-native"),
    pytest.param("w", TO_T, (Tag(20, pcp=3),), {"t": (Tag(20, pcp=3),)}, id="priority-stays-in-a-tag"),
    pytest.param("w", TO_U, (Tag(0, pcp=3),), {"u": ()}, id="a-priority-tag-is-untagged"),
    pytest.param("u", ALL, (Tag(0),), {"v": (), "w": ()}, id="a-priority-tag-is-not-kept"),
    pytest.param("b", TO_T, (Tag(0, pcp=3),), {"t": (Tag(20, pcp=3),)}, id="its-priority-is-kept-in-a-vlan"),
    pytest.param("a", ALL, (Tag(10),), {}, id="an-access-port-sends-no-tag"),
    pytest.param("w", TO_A, (Tag(10), Tag(20)), {}, id="stacked-to-an-access-port"),
    pytest.param("w", TO_T, (Tag(10), Tag(7)), {"t": (Tag(10), Tag(7))}, id="stacked-to-a-trunk"),
    pytest.param("w", ALL, (Tag(20), Tag(10)), {"t": (Tag(20), Tag(10))}, id="no-hop-by-the-native-vlan"),
    pytest.param("w", ALL, (Tag(0), Tag(10)), {}, id="no-hop-by-a-priority-tag"),
    pytest.param("w", ALL, (Tag(10, TPID_8021AD),), {}, id="802.1ad-from-the-wire"),
    pytest.param("t", ALL, (Tag(10, TPID_8021AD),), {}, id="802.1ad-from-a-trunk"),
    pytest.param("a", TO_H, (), {"h": ()}, id="to-the-host"),
    pytest.param("u", TO_H, (), {"w": ()}, id="to-the-host-in-another-vlan"),
    pytest.param(
        "h", ALL, (), {"a": (), "t": (Tag(10),), "n": (Tag(10),), "w": (Tag(10),)}, id="from-the-host"
    ),
    pytest.param("u", LLDP, (), {}, id="link-local"),
    pytest.param("br0", ALL, (), {}, id="from-a-device-that-is-no-end"),
]


@pytest.mark.parametrize(("sender", "dst", "tags", "expected"), CASES)
def test_who_gets_it(
    sender: str, dst: str, tags: tuple[Tag, ...], expected: dict[str, tuple[Tag, ...]]
) -> None:
    frame = Frame(dst, MAC.get(sender, "02:aa:00:00:00:01"), tags)
    assert who_gets(SWITCH, sender, frame) == expected


def test_an_address_of_another_port_is_not_sent_from() -> None:
    assert who_gets(SWITCH, "u", Frame(ALL, MAC["v"])) == {}
    assert who_gets(SWITCH, "u", Frame(ALL, ALL)) == {}


def test_a_private_network_has_nobody_outside() -> None:
    private = {"here": PLAIN, "there": OTHER}
    assert who_gets(private, "u", Frame(ALL, MAC["u"])) == {"v": ()}
    assert who_gets(private, "u", Frame(NOBODY, MAC["u"])) == {}


def test_a_port_that_may_spoof_gets_what_is_unknown() -> None:
    ends = {"here": (*PLAIN, replace(vm("s"), spoofing=True), CABLE)}
    assert who_gets(ends, "s", Frame(MAC["u"], NOBODY)) == {"u": ()}
    assert who_gets(ends, "w", Frame(NOBODY, "02:aa:00:00:00:01")) == {"s": ()}
    assert who_gets(ends, "w", Frame(MAC["u"], "02:aa:00:00:00:01")) == {"u": ()}


def test_an_address_behind_a_port_that_may_spoof_is_its_own_once_heard() -> None:
    spoofing = End("s", "vm", spoofing=True, behind=frozenset({NOBODY}))
    assert who_gets({"here": (*PLAIN, spoofing, CABLE)}, "u", Frame(NOBODY, MAC["u"])) == {"s": ()}


def test_who_was_not_heard_may_still_be_behind_the_wire() -> None:
    ends = {"here": (*PLAIN, replace(vm("s"), heard=False), CABLE)}
    assert who_gets(ends, "u", Frame(MAC["s"], MAC["u"])) == {"s": (), "w": ()}
    assert who_gets(ends, "w", Frame(MAC["s"], NOBODY)) == {"s": ()}


def test_link_local_protocols_where_they_are_allowed() -> None:
    ends = {"here": (*PLAIN, replace(vm("l"), link_local=True), CABLE)}
    assert who_gets(ends, "l", Frame(LLDP, MAC["l"])) == {"w": ()}
    assert who_gets(ends, "w", Frame(LLDP, "02:aa:00:00:00:01")) == {"l": ()}


@given(st.sets(st.tuples(*[st.integers(0, 3)] * 4), max_size=60))
def test_every_pair_that_is_offered_is_covered(rows: set[tuple[int, int, int, int]]) -> None:
    def pairs(of: set[tuple[int, int, int, int]]) -> set[object]:
        return {pair for row in of for pair in combinations(enumerate(row), 2)}

    chosen = set(pairwise(sorted(rows)))
    assert chosen <= rows
    assert pairs(chosen) == pairs(rows)


def test_few_rows_cover_many_combinations() -> None:
    """Ten columns of three values: 59,049 combinations. The best arrays known have 14 rows."""
    assert len(pairwise(list(product(range(3), repeat=10)))) <= 24


def test_cells_have_frames_from_ends_of_their_switches() -> None:
    """And frames without VLANs say the same whether or not the switches have other ports in VLANs."""
    for cell in some("kernel"):
        sending = sending_of(cell)
        if not uses_vlans(cell):
            plain, whole = (topology("kernel", vlans) for vlans in (False, True))
            few, many = (who_gets(ends, sending.sender, sending.frame) for ends in (plain, whole))
            assert few.items() <= many.items()


def test_the_choice_is_small_and_the_whole_is_large() -> None:
    assert len(some("kernel")) < 600 < 10_000 < len(every("kernel"))
