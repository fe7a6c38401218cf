"""What is decided for AF_XDP ports: pure, no privileges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offload import channels
from offload.channels import AS_ON_A_WIRE, CHUNK_MTU, Host
from offload.config import parse, with_channels
from offload.errors import ConfigError, ForeignError, UnsupportedError
from offload.model import (
    Channel,
    Feature,
    Filter,
    Link,
    MemberRow,
    NicSockets,
    PeerFeature,
    PortRecord,
    PortSlot,
    StationRow,
)
from offload.plan import RUNNING, SOCKETS, Desired, Facts, desire, difference, without_fast_path
from tests.unit.test_plan import ETH1, link

MAC = "02:15:5d:00:00:01"
OUTER = link("db1-xsk", 7, kind="veth", peer_ifindex=2, peer_netnsid=3)


def decided(asked: str = "{}", *, heard: bool = True, outer: Link | None = OUTER, **facts: Any) -> Desired:
    """The decision for one AF_XDP port, ``db1``, whose channel is there already."""
    text = f"""
    version: 1
    nics: {{eth1: {{}}}}
    switches: {{ext0: {{type: external, uplink: eth1}}}}
    ports: {{db1: {{switch: ext0, mac: "{MAC}", af_xdp: {asked}}}}}
    """
    links = {"eth1": ETH1} | ({outer.name: outer} if outer else {})
    stations = {(0, MAC, 0): StationRow(0, OUTER.ifindex, "here")} if heard else {}
    given: dict[str, Any] = {
        "links": links,
        "online_cpus": (0, 1),
        "own": frozenset({"db1-xsk"}),
        "held": {"db1": (0, PortRecord("db1", 1, 0, 0, 0, 0, 0))},
        "networks": {"ext0": 0},
        "stations": stations,
        "af_xdp": Host(digest="abc"),
    }
    return desire(with_channels(parse(text)), Facts(**given | facts))


def record(desired: Desired) -> PortRecord:
    value = desired.state[PortSlot(0)]
    assert isinstance(value, tuple)
    return PortRecord.of(value)


def test_a_port_that_was_heard_is_on_the_fast_path() -> None:
    desired = decided()
    assert desired.refusals == ()
    assert desired.ports["db1"].path == "af_xdp"
    assert desired.ports["db1"].queue is not None
    assert desired.state[Channel("db1-xsk", "db1")] == (MAC, 1500, 0, "abc")
    assert desired.state[Filter("eth1", 2, MAC, 0)] == 0
    assert record(desired).flags & RUNNING
    assert not record(desired).flags & SOCKETS


def test_one_that_was_not_is_served_by_the_bridge() -> None:
    desired = decided(heard=False)
    assert desired.ports["db1"].path == "bridge"
    assert desired.ports["db1"].reason == f"nothing has been heard from {MAC} yet"


def test_its_outer_end_gives_whole_frames_and_nobody_polls_for_it() -> None:
    state = decided().state
    assert all(state[Feature("db1-xsk", 7, feature)] is False for feature in AS_ON_A_WIRE)
    assert not any(isinstance(resource, PeerFeature) and resource.device == "db1-xsk" for resource in state)


def test_a_channel_that_is_still_to_be_made_is_planned_whole() -> None:
    desired = decided(outer=None, own=frozenset(), heard=False)
    assert desired.ports["db1"].state == "active"
    assert desired.state[Channel("db1-xsk", "db1")] == (MAC, 1500, 0, "abc")
    assert desired.state[Feature("db1-xsk", 0, AS_ON_A_WIRE[0])] is False
    changes = difference({}, desired.state, {})
    order = [type(change.resource).__name__ for change in changes]
    assert order.index("Channel") < order.index("Feature") < order.index("Member") < order.index("PortSlot")


def test_the_channel_has_the_mtu_of_the_wire() -> None:
    desired = decided(outer=None, own=frozenset(), links={"eth1": replace(ETH1, mtu=9000)})
    assert desired.state[Channel("db1-xsk", "db1")] == (MAC, 9000, 0, "abc")
    assert desired.refusals == ()


def test_hardware_has_a_map_for_the_nic_s_queues_besides() -> None:
    desired = decided("{mode: hardware}")
    assert desired.state[NicSockets("db1")] == (0, 0)
    assert record(desired).flags & SOCKETS
    assert not record(decided("{mode: hardware}", detached=True)).flags & SOCKETS
    assert NicSockets("db1") not in decided("{mode: hardware}", detached=True).state
    assert NicSockets("db1") not in without_fast_path(desired.state)
    assert Channel("db1-xsk", "db1") in without_fast_path(desired.state)


@pytest.mark.parametrize(
    ("af_xdp", "soft", "hard"),
    [
        ("{mode: hardware, owner: {user: qemu}}", 64, 0),
        ("{mode: hardware, owner: {user: qemu}, trusted: true}", 64, 64),
    ],
    ids=["not-trusted", "trusted"],
)
def test_only_who_is_trusted_owns_the_map_of_the_nic(af_xdp: str, soft: int, hard: int) -> None:
    state = decided(af_xdp, af_xdp=Host(users={"qemu": (64, 65)}, digest="abc")).state
    assert state[Channel("db1-xsk", "db1")] == (MAC, 1500, soft, "abc")
    assert state[NicSockets("db1")] == (0, hard)


def test_the_nic_s_map_is_there_before_the_port_runs_and_goes_after() -> None:
    state = decided("{mode: hardware}").state
    came = [type(change.resource).__name__ for change in difference({}, state, {})]
    assert came.index("NicSockets") < came.index("PortSlot")
    went = [type(change.resource).__name__ for change in difference(state, {}, {})]
    assert went.index("PortSlot") < went.index("NicSockets") < went.index("Channel")


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "foreign-device": ("{}", {"own": frozenset()}, ForeignError, "there is a device db1-xsk already"),
    "no-such-user": (
        "{owner: {user: nobody-here}}",
        {"af_xdp": Host(users={"nobody-here": None})},
        ConfigError,
        "ports.db1.af_xdp.owner.user: nobody-here: a user of this host",
    ),
    "no-zero-copy": (
        "{mode: hardware, zero_copy: require}",
        {"af_xdp": Host(zero_copy={"eth1": False})},
        UnsupportedError,
        "the driver of eth1 has no zero copy on this kernel: use zero_copy: auto",
    ),
    "too-long-for-a-chunk": (
        "{mode: hardware}",
        {"links": {"eth1": replace(ETH1, mtu=CHUNK_MTU + 1), "db1-xsk": OUTER}},
        UnsupportedError,
        "do not fit a UMEM's chunk (its MTU is 3501, at most 3500)",
    ),
    "no-multi-buffer": (
        "{}",
        {
            "links": {"eth1": replace(ETH1, mtu=9000), "db1-xsk": OUTER},
            "af_xdp": Host(takes_frags=False),
        },
        UnsupportedError,
        "takes no frames of several buffers (Linux 6.6), and the MTU of eth1 is 9000",
    ),
}


@pytest.mark.parametrize(("af_xdp", "facts", "kind", "told"), REFUSED.values(), ids=REFUSED)
def test_what_this_host_cannot_do_is_refused(
    af_xdp: str, facts: dict[str, Any], kind: type[Exception], told: str
) -> None:
    [refusal] = decided(af_xdp, **facts).refusals
    assert isinstance(refusal, kind)
    assert told in str(refusal)


@pytest.mark.parametrize("mtu", [1500, CHUNK_MTU])
def test_frames_that_fit_need_no_multi_buffer(mtu: int) -> None:
    links = {"eth1": replace(ETH1, mtu=mtu), "db1-xsk": OUTER}
    assert decided("{mode: hardware}", links=links, af_xdp=Host(takes_frags=False)).refusals == ()


def test_a_foreign_device_makes_the_port_fail_and_is_left_alone() -> None:
    desired = decided(own=frozenset())
    assert desired.ports["db1"].state == "failed"
    assert not any(getattr(resource, "device", "") == "db1-xsk" for resource in desired.state)
    assert Channel("db1-xsk", "db1") not in desired.state


def test_ports_without_af_xdp_want_none_of_it() -> None:
    text = """
    version: 1
    switches: {p: {type: private}}
    ports: {a: {switch: p, device: a, mac: "02:00:00:00:00:01"}}
    """
    config = with_channels(parse(text))
    assert channels.to_come(config, {}) == {}
    assert list(channels.refusals(config, {}, (), Host())) == []
    assert channels.desired("a", config.ports["a"], OUTER, 0, "eth1", Host()) == {}


def test_a_switch_s_programs_know_nothing_special_of_it() -> None:
    state = decided().state
    [member] = [
        MemberRow.of(value)
        for resource, value in state.items()
        if type(resource).__name__ == "Member"
        and getattr(resource, "device", "") == "db1-xsk"
        and isinstance(value, tuple)
    ]
    assert member == MemberRow(0, 0, "port", bypass=True)
