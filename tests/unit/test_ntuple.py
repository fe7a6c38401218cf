"""Steering rules: the requests against those of the ethtool program, and what comes of the answers.

No NIC at hand has such rules: see fake_nic.py. No privileges.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.errors import ForeignError, KernelError, PrivilegeError, UnsupportedError, VerifyError
from offload.hardware import Rule
from offload.kernel import ntuple
from tests.unit import fake_nic
from tests.unit.fake_nic import INS, LALL, LCNT, NAME, RULE, FakeNic

WEB1, DB1 = "02:15:5d:00:00:01", "0e:ff:80:7f:00:fe"
ETHER = ("flow-type", "ether")
VID_ONLY = ("m", "0xf000")  # the program's masks have a bit set for what is not looked at
UNINITIALISED = slice(4, 16)
"""flow_type and data of the command: the program leaves them to chance, and nobody reads them (rxclass.c)."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_nic.build(tmp_path_factory.mktemp("fake_nic"))


def requests(nic: FakeNic, command: int) -> list[bytes]:
    found = [bytearray(request) for request in nic.asked if request[0] == command]
    for request in found:
        request[UNINITIALISED] = bytes(12)
    return [bytes(request) for request in found]


CASES = {
    "untagged": ((*ETHER, "dst", WEB1, "action", "1"), (WEB1, None, 1)),
    "queue 0": ((*ETHER, "dst", DB1, "action", "0"), (DB1, None, 0)),
    "many queues": ((*ETHER, "dst", DB1, "action", "65535"), (DB1, None, 65535)),
    "vid": ((*ETHER, "dst", WEB1, "vlan", "10", *VID_ONLY, "action", "3"), (WEB1, 10, 3)),
    "vid in both bytes": ((*ETHER, "dst", DB1, "vlan", "0x102", *VID_ONLY, "action", "2"), (DB1, 0x102, 2)),
    "lowest vid": ((*ETHER, "dst", DB1, "vlan", "1", *VID_ONLY, "action", "7"), (DB1, 1, 7)),
    "last vid": ((*ETHER, "dst", DB1, "vlan", "4094", *VID_ONLY, "action", "7"), (DB1, 4094, 7)),
}


@pytest.mark.parametrize("special", [False, True], ids=["our location", "the driver's location"])
@pytest.mark.parametrize(("arguments", "rule"), CASES.values(), ids=CASES)
def test_requests_are_those_of_the_program(
    library: Path, arguments: tuple[str, ...], rule: tuple[str, int | None, int], special: bool
) -> None:
    ours, theirs = FakeNic(special=special), FakeNic(special=special)
    location = ntuple.insert(ours, NAME, *rule)
    with fake_nic.program(theirs, library) as ethtool:
        ethtool("-N", NAME, *arguments, *(() if special else ("loc", str(location))))
        assert requests(ours, INS) == requests(theirs, INS)
        assert ours.kept == theirs.kept
        ethtool("-n", NAME)
        ntuple.rules(ours, NAME)
        assert requests(ours, LALL)[-1] == requests(theirs, LALL)[-1]
        # Here the number of rules, behind the rule, is left to chance as well.
        asked, by_program = requests(ours, RULE)[-1], requests(theirs, RULE)[-1]
        assert asked[: fake_nic.SPEC_END] == by_program[: fake_nic.SPEC_END]


def test_the_program_shows_our_rule(library: Path) -> None:
    nic = FakeNic()
    location = ntuple.insert(nic, NAME, WEB1, 10, 3)
    with fake_nic.program(nic, library) as ethtool:
        assert [line.strip() for line in ethtool("-n", NAME).splitlines() if line] == [
            "Total 1 rules",
            f"Filter: {location}",
            "Flow Type: Raw Ethernet",
            "Src MAC addr: 00:00:00:00:00:00 mask: FF:FF:FF:FF:FF:FF",
            "Dest MAC addr: 02:15:5D:00:00:01 mask: 00:00:00:00:00:00",
            "Ethertype: 0x0 mask: 0xFFFF",
            "VLAN EtherType: 0x0 mask: 0xffff",
            "VLAN: 0xa mask: 0xf000",
            "User-defined: 0x0 mask: 0xffffffffffffffff",
            "Action: Direct to queue 3",
        ]
        ntuple.delete(nic, NAME, location)
        assert "Total 0 rules" in ethtool("-n", NAME)


FOREIGN = {
    "a source as well": (*ETHER, "src", DB1, "dst", WEB1, "action", "1"),
    "an EtherType as well": (*ETHER, "dst", WEB1, "proto", "0x800", "action", "1"),
    "part of a MAC": (*ETHER, "dst", WEB1, "m", "00:00:00:00:00:01", "action", "1"),
    "the priority as well": (*ETHER, "dst", WEB1, "vlan", "10", "action", "1"),
    "part of a VID": (*ETHER, "dst", WEB1, "vlan", "10", "m", "0xf001", "action", "1"),
    "the tag's EtherType": (
        *ETHER,
        "dst",
        WEB1,
        "vlan-etype",
        "0x88a8",
        "vlan",
        "10",
        *VID_ONLY,
        "action",
        "1",
    ),
    "the driver's own": (*ETHER, "dst", WEB1, "user-def", "1", "action", "1"),
    "drop": (*ETHER, "dst", WEB1, "action", "-1"),
    "a virtual function": (*ETHER, "dst", WEB1, "vf", "0", "queue", "1"),
    "an RSS context": (*ETHER, "dst", WEB1, "context", "1"),
    "another kind": ("flow-type", "udp4", "dst-port", "53", "action", "1"),
}


@pytest.mark.parametrize("arguments", FOREIGN.values(), ids=FOREIGN)
def test_a_rule_that_says_more_is_not_plain(library: Path, arguments: tuple[str, ...]) -> None:
    nic = FakeNic()
    with fake_nic.program(nic, library) as ethtool:
        ethtool("-N", NAME, *arguments, "loc", "5")
    [rule] = ntuple.rules(nic, NAME)
    assert rule == Rule(5, "", None, -1)
    assert not rule.plain


def test_rules_come_by_location() -> None:
    nic = FakeNic()
    made = {
        ntuple.insert(nic, NAME, WEB1, None, 2): Rule(7, WEB1, None, 2),
        ntuple.insert(nic, NAME, WEB1, 10, 1): Rule(0, WEB1, 10, 1),
        ntuple.insert(nic, NAME, DB1, 0x102, 3): Rule(1, DB1, 0x102, 3),
    }
    assert ntuple.rules(nic, NAME) == (made[0], made[1], made[7])


@pytest.mark.parametrize(
    ("kept", "taken", "vid", "location"),
    [
        pytest.param([], [], None, 7, id="without a VID: last"),
        pytest.param([], [], 10, 0, id="with a VID: first"),
        pytest.param([7, 5], [6], None, 4, id="around others and what is taken, from the end"),
        pytest.param([0, 2], [1], 10, 3, id="around others and what is taken, from the front"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], [], None, 0, id="the only one"),
    ],
)
def test_locations(kept: list[int], taken: list[int], vid: int | None, location: int) -> None:
    nic = FakeNic()
    others = dict.fromkeys(kept, bytes(fake_nic.SPEC_END - fake_nic.SPEC))
    nic.kept |= others
    assert ntuple.insert(nic, NAME, WEB1, vid, 1, taken) == location
    assert {place: nic.kept[place] for place in kept} == others


def test_a_driver_that_finds_locations_is_not_told_one() -> None:
    nic = FakeNic(special=True)
    nic.kept[7] = bytes(fake_nic.SPEC_END - fake_nic.SPEC)
    assert ntuple.insert(nic, NAME, WEB1, None, 1, {6}) == 6  # its own choice
    assert [request[0] for request in nic.asked] == [LCNT, INS, RULE]


@pytest.mark.parametrize("special", [False, True])
def test_a_full_table(special: bool) -> None:
    nic = FakeNic(size=2, special=special)
    before = [ntuple.insert(nic, NAME, WEB1, vid, 1) for vid in (10, 11)]
    with pytest.raises(UnsupportedError, match=rf"^{NAME}: cannot steer {DB1} to RX queue 2: .*`ethtool -n"):
        ntuple.insert(nic, NAME, DB1, None, 2)
    assert sorted(nic.kept) == sorted(before)
    found = ntuple.probe(nic, NAME)
    assert (found.state, "`ethtool -n fake0`" in found.remedy) == ("unknown", True)


def test_a_driver_that_makes_another_rule_of_it() -> None:
    def without_tag(rule: bytes) -> bytes:
        return bytes([*rule[:3], 0]) + rule[4:]

    nic = FakeNic()
    nic.distort = without_tag
    with pytest.raises(
        UnsupportedError, match=r"steer .*:01 in VLAN 10 .*another rule.*vid=None.*queue: software"
    ):
        ntuple.insert(nic, NAME, WEB1, 10, 1)
    assert not nic.kept
    assert ntuple.insert(nic, NAME, WEB1, None, 1) == 7


@pytest.mark.parametrize(
    ("code", "feature", "error", "says"),
    [
        (errno.EINVAL, (True, False), UnsupportedError, "use `queue: software`"),
        (errno.EOPNOTSUPP, (False, False), UnsupportedError, "`ethtool -K fake0 ntuple on`"),
        (524, (False, True), UnsupportedError, "use `queue: software`"),
        (errno.EEXIST, (True, False), ForeignError, "`ethtool -n fake0`"),
        (errno.EPERM, (True, False), PrivilegeError, "CAP_NET_ADMIN"),
        (errno.ENETDOWN, (True, False), KernelError, "the device is down"),
    ],
)
def test_refusals(code: int, feature: tuple[bool, bool], error: type[Exception], says: str) -> None:
    nic = FakeNic()
    nic.refuse, nic.feature = lambda rule: code, feature
    with pytest.raises(error, match=rf"^fake0: cannot steer {WEB1} to RX queue 1: .*\(.*{says}"):
        ntuple.insert(nic, NAME, WEB1, None, 1)


def tagged(rule: bytes) -> int:
    return errno.EINVAL if rule[3] else 0


@pytest.mark.parametrize(
    ("refuse", "feature", "state", "says"),
    [
        pytest.param(lambda rule: 0, (True, False), "yes", "MAC and VLAN was inserted", id="takes all"),
        pytest.param(tagged, (True, False), "yes", "not by MAC and VLAN", id="takes MACs"),
        pytest.param(lambda rule: errno.EINVAL, (True, True), "no", "Invalid argument", id="takes none"),
        pytest.param(lambda rule: errno.EOPNOTSUPP, (False, False), "unknown", "ntuple on", id="is off"),
        pytest.param(lambda rule: errno.EPERM, (True, False), "unknown", "CAP_NET_ADMIN", id="not root"),
        pytest.param(
            lambda rule: 0, (False, True), "no", "rx-ntuple-filter is off, and fixed", id="has none"
        ),
    ],
)
def test_probe(refuse: Callable[[bytes], int], feature: tuple[bool, bool], state: str, says: str) -> None:
    nic = FakeNic()
    ntuple.insert(nic, NAME, WEB1, None, 1)
    nic.refuse, nic.feature = refuse, feature
    before = dict(nic.kept)
    found = ntuple.probe(nic, NAME)
    assert (found.state, bool(found.remedy)) == (state, state != "yes")
    assert says in f"{found.why} {found.remedy}"
    assert nic.kept == before


def test_what_can_be_told_without_trying() -> None:
    nic = FakeNic()
    assert ntuple.could_tell_without_trying(nic, NAME).state == "unknown"
    assert [request[0] for request in nic.asked] == [LCNT]
    nic.feature = (False, True)
    assert ntuple.could_tell_without_trying(nic, NAME).state == "no"
    assert ntuple.could_tell_without_trying(Moving([errno.EOPNOTSUPP]), NAME).state == "no"


class Moving(FakeNic):
    """The answers to the first requests for anything are these errnos; 0 is none."""

    def __init__(self, errors: list[int]) -> None:
        super().__init__()
        ntuple.insert(self, NAME, WEB1, None, 1)
        self.errors = errors

    def run(self, ifname: str, command: bytes) -> bytes:
        code = self.errors.pop(0) if getattr(self, "errors", None) else 0
        if code:
            raise OSError(code, os.strerror(code))
        return super().run(ifname, command)


@pytest.mark.parametrize(
    "errors", [[0, errno.EMSGSIZE], [0, 0, errno.ENOENT], [0, 0, errno.EINVAL, 0, errno.EMSGSIZE]]
)
def test_a_table_that_changes_while_it_is_read_is_read_again(errors: list[int]) -> None:
    assert ntuple.rules(Moving(errors), NAME) == (Rule(7, WEB1, None, 1),)


@pytest.mark.parametrize("errors", [[0, errno.EIO], [0, errno.EMSGSIZE] * 3], ids=["broken", "restless"])
def test_a_table_that_cannot_be_read_is_not_empty(errors: list[int]) -> None:
    with pytest.raises(KernelError, match=r"^fake0: cannot read its steering rules"):
        ntuple.rules(Moving(errors), NAME)


def test_a_nic_without_such_rules() -> None:
    assert ntuple.rules(Moving([errno.EOPNOTSUPP]), NAME) == ()


def test_a_driver_that_does_not_delete() -> None:
    class Stubborn(FakeNic):
        def run(self, ifname: str, command: bytes) -> bytes:
            return command if command[0] == fake_nic.DEL else super().run(ifname, command)

    nic = Stubborn()
    location = ntuple.insert(nic, NAME, WEB1, None, 1)
    with pytest.raises(VerifyError, match="steering rule 7 is still there"):
        ntuple.delete(nic, NAME, location)
    with pytest.raises(KernelError, match="delete its steering rule 3: No such"):
        ntuple.delete(FakeNic(), NAME, 3)
