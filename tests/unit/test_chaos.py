"""How the chaos runs choose events and judge frames."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

from tests.chaos import OTHER_VID, Guest, fault, sequence
from tests.lab import WIRE_MAC, Namespace, Vm, tag, test_frame, udp4

MAC, OTHER_MAC = "02:15:5d:00:00:01", "02:15:5d:00:00:02"
VID = 10


def test_a_seed_gives_one_sequence_in_which_everything_has_its_turn() -> None:
    first, again = (list(islice(sequence("abcdef", Random(7)), 18)) for _ in range(2))
    assert first == again
    rounds = [first[:6], first[6:12], first[12:]]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


@pytest.mark.parametrize(
    ("frame", "wrong"),
    [
        pytest.param(test_frame(MAC, WIRE_MAC, 5), None, id="right"),
        pytest.param(test_frame(OTHER_MAC, WIRE_MAC, 5), "for 02:15:5d:00:00:02", id="another VM's"),
        pytest.param(test_frame(MAC, WIRE_MAC, 5, tags=tag(VID)), "has the tag 8100000a", id="with its tag"),
        pytest.param(test_frame(MAC, WIRE_MAC, 4), "came twice", id="again"),
        pytest.param(udp4(MAC, WIRE_MAC, "192.0.2.1", "192.0.2.2", b"else"), None, id="of somebody else"),
    ],
)
def test_what_is_wrong_with_a_frame(frame: bytes, wrong: str | None) -> None:
    told = fault(frame, MAC, {4})
    assert (told is None) if wrong is None else (told and wrong in told)


@pytest.mark.parametrize("vid", [0, VID])
def test_a_guest_s_frames(vid: int) -> None:
    """Of IP and of another protocol; and those that are not of its VLAN."""
    guest = Guest(Vm("web1", MAC, Namespace("none")), vid, "queue")
    stripped = {number: untagged(guest.frame(number), vid) for number in range(6)}
    assert [fault(frame, MAC, set(stripped) - {number}) for number, frame in stripped.items()] == [None] * 6
    assert {frame[12:14] for frame in stripped.values()} == {b"\x08\x00", b"\x88\xb5"}
    strays = [guest.stray(number) for number in range(6)]
    assert {frame[12:16] == tag(OTHER_VID) for frame in strays} == ({True, False} if vid else {True})
    assert all("of another VLAN" in (fault(frame, MAC, set()) or "") for frame in strays)


def untagged(frame: bytes, vid: int) -> bytes:
    if not vid:
        return frame
    assert frame[12:16] == tag(vid)
    return frame[:12] + frame[16:]
