"""Which bonds can be uplinks. No privileges."""

from __future__ import annotations

import pytest

from offload.bonds import HASHES, MODES, Bond, refusals
from offload.errors import ForeignError, OffloadError, UnsupportedError
from offload.model import Link, XdpMode


def link(name: str, kind: str | None = None, master: str | None = None) -> Link:
    number = 9 if master else None
    return Link(3, name, kind, "02:00:00:00:00:01", 1500, True, True, False, None, number, master, 4, 4)


LINKS = {
    each.name: each
    for each in (
        link("bond0", "bond"),
        link("team0", "team"),
        link("br0", "bridge"),
        link("eth1", master="bond0"),
        link("eth2", master="team0"),
        link("eth3", master="br0"),
        link("eth4"),
    )
}
GOOD = Bond("active-backup", "layer2", ("eth1",), True, {})


def told(nic: str, bond: Bond | None = None, mode: XdpMode = "native") -> list[OffloadError]:
    return list(refusals(nic, LINKS, mode, bond))


@pytest.mark.parametrize(("nic", "master"), [("eth1", "bond0"), ("eth2", "team0")])
def test_a_member_is_refused_with_the_name_of_its_bond(nic: str, master: str) -> None:
    (error,) = told(nic)
    assert isinstance(error, ForeignError)
    assert f"name {master} as the uplink" in str(error)


@pytest.mark.parametrize("nic", ["eth3", "eth4"])
def test_other_devices_are_none_of_its_business(nic: str) -> None:
    assert told(nic) == []


def test_a_team_takes_generic_xdp_alone() -> None:
    (error,) = told("team0")
    assert isinstance(error, UnsupportedError)
    assert "xdp_mode: generic" in str(error)
    assert told("team0", mode="generic") == []


@pytest.mark.parametrize(
    ("bond", "said"),
    [
        pytest.param(GOOD, None, id="active-backup"),
        pytest.param(Bond("balance-rr", "layer2", ("eth1",)), None, id="balance-rr-not-told"),
        pytest.param(Bond("802.3ad", "layer2+3", ("eth1",), True), None, id="802.3ad"),
        pytest.param(Bond("802.3ad", "layer3+4", ("eth1",), True), None, id="802.3ad-layer3+4"),
        pytest.param(Bond("balance-xor", "layer2", ("eth1",), True), None, id="balance-xor"),
        pytest.param(Bond("active-backup", "vlan+srcmac", ("eth1",), True), None, id="hash-not-used"),
        pytest.param(Bond("802.3ad", "vlan+srcmac", ("eth1",)), "xmit_hash_policy layer2+3", id="hash"),
        pytest.param(
            Bond("balance-xor", "vlan+srcmac", ("eth1",)), "xmit_hash_policy layer2+3", id="xor-hash"
        ),
        pytest.param(Bond("balance-alb", "layer2", ("eth1",)), "mode balance-alb", id="balance-alb"),
        pytest.param(Bond("broadcast", "layer2", ("eth1",)), "mode broadcast", id="broadcast"),
        pytest.param(Bond("active-backup", "layer2"), "without members", id="no-members"),
        pytest.param(Bond("active-backup", "layer2", ("eth1",), False), "not all of its", id="driver"),
    ],
)
def test_modes_of_a_bond(bond: Bond, said: str | None) -> None:
    errors = told("bond0", bond)
    assert [isinstance(error, UnsupportedError) for error in errors] == ([True] if said else [])
    assert all(said and said in str(error) for error in errors)


def test_modes_and_hashes_have_the_kernel_s_numbers() -> None:
    """BOND_MODE_… and BOND_XMIT_POLICY_… of include/uapi/linux/if_bonding.h."""
    modes = {"balance-rr": 0, "active-backup": 1, "balance-xor": 2, "broadcast": 3, "802.3ad": 4}
    modes |= {"balance-tlb": 5, "balance-alb": 6}
    hashes = {"layer2": 0, "layer3+4": 1, "layer2+3": 2, "encap2+3": 3, "encap3+4": 4, "vlan+srcmac": 5}
    assert {name: number for number, name in enumerate(MODES)} == modes
    assert {name: number for number, name in enumerate(HASHES)} == hashes


def test_generic_xdp_asks_for_members_too() -> None:
    (error,) = told("bond0", Bond("active-backup", "layer2"), mode="generic")
    assert "without members" in str(error)


def test_generic_xdp_asks_nothing_of_the_mode() -> None:
    assert told("bond0", Bond("balance-alb", "layer2", ("eth1",)), mode="generic") == []


def test_members_that_hide_tags_are_named_in_either_mode() -> None:
    bond = Bond("active-backup", "layer2", ("eth1",), True, {"eth1": ("rx-vlan-hw-parse",)})
    for mode in ("native", "generic"):
        (error,) = told("bond0", bond, "native" if mode == "native" else "generic")
        assert "`ethtool -K eth1 rx-vlan-hw-parse off`" in str(error)
