"""What is said of a frame, from what the programs did with it. Needs no privilege."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from scapy.all import IP, UDP, Dot1AD, Dot1Q, Ether, ICMPv6ND_RA, IPv6  # type: ignore[attr-defined]

from offload.cli import main
from offload.explain import MADE_UP, Kind, Owner, Sample, Scene, Step, answer, sorted_by, vlan_action
from offload.hardware import Function, Rule
from offload.model import MemberRow, NetworkRow, PortRecord
from offload.plan import BYPASS, RUNNING
from tests.unit.fake_service import FakeService, served

DST, SRC = "02:15:5d:00:00:01", "02:15:5d:00:00:02"
BROADCAST = "ff:ff:ff:ff:ff:ff"
RECORD = PortRecord("web1", 3, 2, 0, BYPASS | RUNNING, 1514, 7)
HOST = PortRecord("host:ext0", 0, None, 0, BYPASS, 1514, 8)
OWNER = Owner(RECORD, "port", "here")
NETWORK = NetworkRow("ext0", 9, 0, 0, False)
SENDER = MemberRow(4, 0, "port", bypass=True)
WIRE = Scene(NETWORK, "eth1", "eth1", owner=OWNER, target=RECORD)
VM = Scene(NETWORK, "eth1", "port db1", sender=SENDER, owner=OWNER)
FRAME = Sample(DST, SRC)


def uplink(counter: str, port: str | None = "web1") -> Step:
    verdict = "drop" if counter == "vlan_nic" else "redirect" if port else "pass"
    return Step("uplink", "eth1", verdict, counter, port)  # type: ignore[arg-type]


def sent(counter: str) -> Step:
    return Step("sent", "db1", "redirect", counter, "db1")


def at_function(counter: str, port: str | None = None) -> Step:
    return Step("function", "eth1v0", "pass" if counter == "passed" else "drop", counter, port)


VF = Function(0, DST, 0, "eth1v0", 9)
STRAYED = Step("strayed", "eth1v0", "redirect", None)
QUEUED = uplink("queued")
HANDED = Step("queue", "eth1", "redirect", "handed", "web1")
TO_BRIDGE = Step("wire", "eth1", "pass", "tx_bridge", "uplink:eth1")
LEFT_TO_GRO = Step("uplink", "eth1", "pass", "left", "web1")
TO_PORT = Step("wire", "eth1", "redirect", "tx_local", "uplink:eth1")
LOCAL = Step("guard", "web1", "pass", "local", "web1")
CHANNEL = Step("channel", "web1", "redirect", "handed", "web1")
NO_CONSUMER = Step("channel", "web1", "drop", "no_consumer", "web1")


def changed(owner: Owner = OWNER, **record: object) -> Owner:
    return replace(owner, record=replace(owner.record, **record))  # type: ignore[arg-type]


def missed(counter: str) -> tuple[Step, ...]:
    return (uplink(counter, None), TO_BRIDGE)


ASKING = replace(NETWORK, ask_bridge=True)
FROM_WIRE = {
    # steps, owner and further fields of the scene, verdict, part of the reason
    "queue": ((QUEUED, HANDED), {}, "queue", "gives 02:15:5d:00:00:01 untagged to port web1: its queue is"),
    "direct": ((uplink("direct"),), {}, "queue", "served by CPU 2"),
    "no-cpu-of-its-own": (
        (uplink("direct"),),
        {"target": replace(RECORD, cpu=None)},
        "queue",
        "on the CPU of the NIC's RX queue",
    ),
    "rule": (
        (QUEUED, HANDED),
        {"by_nic": Rule(5, DST, None, 6)},
        "queue",
        "a rule in eth1 gives 02:15:5d:00:00:01 untagged to RX queue 6; a filter on eth1 gives "
        "02:15:5d:00:00:01 untagged to port web1: its queue is served by CPU 2",
    ),
    "rule-bridge": (
        missed("paused"),
        {"by_nic": Rule(5, DST, None, 6)},
        "bridge",
        "to RX queue 6; port web1 takes nothing from its queue just now",
    ),
    "function": (
        (at_function("direct", "web1"),),
        {"by_nic": VF},
        "queue",
        "eth1 gives 02:15:5d:00:00:01 untagged to its virtual function eth1v0, as read back; a filter on "
        "eth1 gives 02:15:5d:00:00:01 untagged to port web1: its queue is served by CPU 2",
    ),
    "function-channel": (
        (at_function("direct", "web1"), CHANNEL),
        {"by_nic": VF},
        "af_xdp",
        "as read back; a filter on eth1 gives 02:15:5d:00:00:01 untagged to port web1, whose consumer has a",
    ),
    "function-vlan": (
        (at_function("vlan_nic", "web1"),),
        {"by_nic": VF},
        "drop",
        "eth1v0, as read back; port web1 must not get",
    ),
    "function-nobody": (
        (at_function("stranger"),),
        {"by_nic": VF},
        "drop",
        "as read back; eth1v0 delivers to nobody just now",
    ),
    "function-another's": (
        (at_function("stranger"),),
        {"by_nic": VF, "served": "web2"},
        "drop",
        "eth1v0 delivers to port web2, and drops what is for anybody else",
    ),
    "function-expected": (
        (at_function("stranger"),),
        {"by_nic": VF, "served": "web1", "owner": replace(OWNER, state="expected")},
        "drop",
        "eth1v0 drops what no filter on eth1 has, as nothing was heard from port web1 yet",
    ),
    "function-down": ((Step("function", "eth1v0", "drop", None),), {"by_nic": VF}, "drop", "eth1v0 is down"),
    "function-paused": (
        (at_function("passed"), STRAYED, TO_BRIDGE),
        {"by_nic": VF, "owner": changed(flags=0)},
        "bridge",
        "as read back; port web1 takes nothing from its queue just now: its device, or the other end, is "
        "down: it goes to the bridge of ext0",
    ),
    "function-away": (
        (at_function("passed"), STRAYED, TO_BRIDGE),
        {"by_nic": VF, "owner": changed(flags=0, ifindex=0)},
        "bridge",
        "the device of port web1 is away: it goes to",
    ),
    "function-too-big": (
        (at_function("passed"), STRAYED, TO_BRIDGE),
        {"by_nic": VF, "owner": changed(max_len=59)},
        "bridge",
        "60 bytes are more than the MTU of port web1 has room for (59 bytes)",
    ),
    "function-otherwise": (
        (at_function("passed"), STRAYED, TO_BRIDGE),
        {"by_nic": VF},
        "bridge",
        "port web1 could not be handed it (passed)",
    ),
    "function-strayed-nobody": (
        (at_function("passed"), replace(STRAYED, verdict="drop")),
        {"by_nic": VF, "owner": None},
        "drop",
        "no port of ext0 has 02:15:5d:00:00:01 untagged, so that eth1v0 drops it",
    ),
    "function-broadcast": (
        (at_function("group"), replace(at_function("group"), device="eth1v1"), *missed("broadcast")),
        {},
        "bridge",
        "a broadcast is for many, and eth1v0 and eth1v1 may have it too and drop theirs: it goes to the",
    ),
    "merged": (
        (LEFT_TO_GRO, TO_PORT, replace(LOCAL, counter="merged")),
        {},
        "queue",
        "which has it merged with its neighbours first (GRO), on the CPU of the RX queue of eth1",
    ),
    "socket": ((uplink("socket"),), {"rx_queue": 3}, "af_xdp", "a socket on RX queue 3 of eth1"),
    "channel": ((QUEUED, HANDED, CHANNEL), {}, "af_xdp", "at its software channel"),
    "no-consumer": ((QUEUED, HANDED, NO_CONSUMER), {}, "drop", "port web1, whose consumer has put no"),
    "vlan": ((uplink("vlan_nic"),), {}, "drop", "port web1 must not get a frame without a tag"),
    "broadcast": (
        missed("broadcast"),
        {},
        "bridge",
        "a broadcast is for many: it goes to the bridge of ext0",
    ),
    "multicast": (missed("multicast"), {}, "bridge", "a multicast is for many"),
    "malformed": (missed("malformed"), {}, "bridge", "it ends in its own headers"),
    "nobody": (missed("no_filter"), {"owner": None}, "bridge", "no filter on eth1 has 02:15:5d:00:00:01"),
    "nobody-here": (missed("no_filter"), {"owner": None}, "bridge", "no port of ext0 has that address"),
    "other-vlan": (
        missed("no_filter"),
        {"owner": None, "elsewhere": (("port web1", 10), ("port web2", 0))},
        "bridge",
        "which is an address of port web1 in VLAN 10, port web2 untagged:",
    ),
    "expected": (
        missed("no_filter"),
        {"owner": replace(OWNER, state="expected")},
        "bridge",
        "nothing was heard from port web1 yet",
    ),
    "away": (
        missed("no_filter"),
        {"owner": replace(OWNER, state="away")},
        "bridge",
        "port web1 was last heard from the wire: its VM has moved",
    ),
    "off": (missed("no_filter"), {"owner": changed(flags=0)}, "bridge", "`queue: off`"),
    "no-queue": (missed("no_filter"), {"owner": changed(queue=0)}, "bridge", "`offload ports web1` says why"),
    "late": (missed("no_filter"), {}, "bridge", "though port web1 has a queue: is the daemon running?"),
    "paused": (missed("paused"), {}, "bridge", "port web1 takes nothing from its queue just now"),
    "paused-away": (
        missed("paused"),
        {"owner": replace(OWNER, state="away")},
        "bridge",
        "port web1 was last heard from the wire",
    ),
    "no-device": (
        missed("no_device"),
        {"owner": changed(ifindex=0)},
        "bridge",
        "device of port web1 is away",
    ),
    "no-cpu": (missed("no_cpu"), {}, "bridge", "the queue of port web1 is on a CPU that does not serve eth1"),
    "too-big": (missed("too_big"), {}, "bridge", "60 bytes are more than the MTU of port web1"),
    "frags": (missed("frags"), {}, "bridge", "it comes in several buffers, and the device of port web1"),
    "returned": (
        (QUEUED, Step("queue", "eth1", "pass", "returned", "web1"), TO_BRIDGE),
        {"owner": changed(ifindex=0)},
        "bridge",
        "the device of port web1 is away",
    ),
    "returned-otherwise": (
        (QUEUED, Step("queue", "eth1", "pass", "returned", "web1"), TO_BRIDGE),
        {},
        "bridge",
        "port web1 could not be handed it (returned)",
    ),
    "detached": ((TO_BRIDGE,), {}, "bridge", "the fast path of eth1 is detached"),
    "refused": (
        (uplink("no_filter", None), Step("wire", "eth1", "drop", "vlan_sent", "uplink:eth1")),
        {},
        "drop",
        "no frame from the wire may bring a frame without a tag into ext0",
    ),
    "host": (
        (uplink("no_filter", None), Step("guard", "host0i", "pass", "local", "host:ext0")),
        {"owner": Owner(HOST, "host", "here")},
        "host",
        "is the host's on ext0",
    ),
    "no-switch": ((), {"network": None}, "host", "eth1 is in no switch"),
}


@pytest.mark.parametrize("case", FROM_WIRE)
def test_from_the_wire(case: str) -> None:
    steps, fields, verdict, reason = FROM_WIRE[case]
    view = answer(FRAME, FRAME, steps, replace(WIRE, **fields))  # type: ignore[arg-type]
    assert view.verdict == verdict
    assert reason in view.reason
    assert "None" not in view.reason


FROM_VM = {
    "queue": ((sent("tx_local"), LOCAL), {}, "queue", "an address of port web1 on the same switch"),
    "channel": ((sent("tx_local"), LOCAL, CHANNEL), {}, "af_xdp", "past the bridge it reaches port web1"),
    "no-consumer": ((sent("tx_local"), LOCAL, NO_CONSUMER), {}, "drop", "no socket into its map"),
    "host": (
        (sent("tx_local"), LOCAL),
        {"owner": Owner(HOST, "host", "here")},
        "host",
        "is the host's on ext0",
    ),
    "own": ((sent("tx_local"),), {}, "drop", "untagged is an address of port db1 itself"),
    "other-end": (
        (sent("tx_local"), Step("guard", "web1", "drop", "vlan_bridge", "web1")),
        {},
        "drop",
        "port web1 must not get",
    ),
    "flooded": (
        (sent("tx_local"), Step("guard", "web1", "drop", None)),
        {},
        "drop",
        "web1 lets no such frame out (not counted)",
    ),
    "uplink": (
        (sent("tx_direct"),),
        {"owner": None},
        "uplink",
        "no port of ext0 has 02:15:5d:00:00:01 untagged",
    ),
    "uplink-away": (
        (sent("tx_direct"),),
        {"owner": replace(OWNER, state="away")},
        "uplink",
        "port web1 was last heard from the wire: its VM has moved, or another machine has its address: "
        "it leaves by eth1",
    ),
    "off": (
        (sent("tx_bridge"),),
        {"sender": replace(SENDER, bypass=False)},
        "bridge",
        "port db1 sends nothing past the bridge",
    ),
    "expected": (
        (sent("tx_bridge"),),
        {"owner": replace(OWNER, state="expected")},
        "bridge",
        "nothing was heard from port web1 yet",
    ),
    "to-off": (
        (sent("tx_bridge"),),
        {"owner": changed(flags=0)},
        "bridge",
        "port web1 is handed nothing past",
    ),
    "too-long": ((sent("tx_bridge"),), {"owner": changed(max_len=59)}, "bridge", "room for (59 bytes)"),
    "gone": ((sent("tx_bridge"),), {}, "bridge", "the device of port web1 is away"),
    "asking": (
        (sent("tx_bridge"),),
        {"owner": None, "network": ASKING},
        "bridge",
        "may send from any address",
    ),
    "alone": ((sent("tx_bridge"),), {"owner": None, "nic": None}, "bridge", "and ext0 has no uplink"),
    "too-long-for-the-nic": ((sent("tx_bridge"),), {"owner": None}, "bridge", "eth1 is not handed it"),
    "spoofed": ((sent("spoofed"),), {}, "drop", "02:15:5d:00:00:02 untagged is no address of port db1"),
    "dhcp": ((sent("guard_dhcp"),), {}, "drop", "allow dhcp_server"),
    "ra": ((sent("guard_ra"),), {}, "drop", "allow router_advertisement"),
    "link-local": ((sent("link_local"),), {}, "drop", "allow link_local_protocols"),
    "vlan": ((sent("vlan_sent"),), {}, "drop", "port db1 may not send a frame without a tag"),
}


@pytest.mark.parametrize("case", FROM_VM)
def test_from_a_vm(case: str) -> None:
    steps, fields, verdict, reason = FROM_VM[case]
    scene = replace(VM, target=RECORD, **fields)  # type: ignore[arg-type]
    view = answer(FRAME, FRAME, steps, scene)
    assert view.verdict == verdict
    assert reason in view.reason
    assert "None" not in view.reason
    assert (view.queue, view.cpu) == (None, None), "queues are for frames from the wire"


def test_a_group_from_a_vm_is_for_many() -> None:
    view = answer(replace(FRAME, dst=BROADCAST), FRAME, (sent("tx_bridge"),), replace(VM, owner=None))
    assert view.reason == "a broadcast or multicast is for many: it goes to the bridge of ext0"


@pytest.mark.parametrize(
    ("vids", "sender", "told"),
    [
        pytest.param((10,), SENDER, "a tag of VLAN 10: only a trunk's", id="untagged-port"),
        pytest.param((30,), replace(SENDER, trunk=True), "a tag of VLAN 30: its trunk has not", id="trunk"),
        pytest.param((), replace(SENDER, trunk=True, pvid=None), "its trunk has no native VLAN", id="native"),
        pytest.param((10, 20), SENDER, "a second tag behind VID 10: 802.1ad tags", id="stacked"),
    ],
)
def test_which_tags_a_port_may_not_send(vids: tuple[int, ...], sender: MemberRow, told: str) -> None:
    view = answer(replace(FRAME, vids=vids), FRAME, (sent("vlan_sent"),), replace(VM, sender=sender))
    assert told in view.reason


def test_who_gets_it_and_by_which_queue() -> None:
    view = answer(replace(FRAME, vids=(10,)), FRAME, (QUEUED, HANDED), WIRE)
    assert (view.port, view.queue, view.cpu, view.vlan_action) == ("web1", 3, 2, "strip")
    assert [step.counter for step in view.steps] == ["queued", "handed"]


@pytest.mark.parametrize(
    ("vids", "told"),
    [
        pytest.param((10,), "eth1v0 delivers to port web2, and drops", id="another's"),
        pytest.param((10, 20), "port web2 must not get a second tag behind VID 10: 802.1ad", id="stacked"),
    ],
)
def test_the_vlan_rests_on_the_hardware(vids: tuple[int, ...], told: str) -> None:
    scene = replace(WIRE, by_nic=replace(VF, vid=10), served="web2")
    view = answer(replace(FRAME, vids=vids), FRAME, (at_function("stranger"),), scene)
    hardware = (
        f"eth1 gives {DST} in VLAN 10 to its virtual function eth1v0 and strips the tag, so that the VLAN "
        "rests on the hardware: it was read back as 10; "
    )
    assert (view.verdict, view.reason.startswith(hardware + told)) == ("drop", True)


@pytest.mark.parametrize(
    ("vids", "service", "found"),
    [
        pytest.param((), False, 1, id="untagged"),
        pytest.param((0,), False, 1, id="priority-tagged"),
        pytest.param((10,), False, 0, id="vlan"),
        pytest.param((10,), True, 1, id="no-tag-to-a-nic"),
        pytest.param((11,), False, 3, id="any-vlan"),
        pytest.param((12,), False, 2, id="rule-of-a-vlan"),
    ],
)
def test_what_a_nic_sorts_by_itself(vids: tuple[int, ...], service: bool, found: int) -> None:
    """A rule that names no VLAN takes what nothing before it did."""
    sorting = (replace(VF, vid=10), VF, Rule(1, DST, 12, 2), Rule(2, DST, None, 3), Rule(3, SRC, None, 4))
    assert sorted_by(replace(FRAME, vids=vids, service=service), sorting) is sorting[found]
    assert sorted_by(replace(FRAME, dst=BROADCAST), sorting) is None


def test_a_socket_on_the_nic_has_no_cpu_of_the_queue() -> None:
    view = answer(FRAME, FRAME, (uplink("socket"),), WIRE)
    assert (view.port, view.queue, view.cpu) == ("web1", 3, None)


@pytest.mark.parametrize(
    ("step", "port"),
    [
        pytest.param(uplink("vlan_nic"), "web1", id="whose-counter-it-is"),
        pytest.param(Step("wire", "eth1", "drop", "vlan_sent", "uplink:eth1"), None, id="the-nic-s-own"),
    ],
)
def test_a_drop_is_of_the_port_that_counts_it(step: Step, port: str | None) -> None:
    view = answer(replace(FRAME, vids=(0, 5)), FRAME, (step,), WIRE)
    assert (view.verdict, view.port, view.vlan_action) == ("drop", port, "none")


# The frame


@pytest.mark.parametrize(
    ("before", "after", "action"),
    [
        pytest.param((), (), "none", id="untagged"),
        pytest.param((10,), (10,), "none", id="stays"),
        pytest.param((10,), (), "strip", id="access"),
        pytest.param((), (10,), "push", id="from-access"),
        pytest.param((0,), (), "strip", id="priority"),
        pytest.param((0,), (10,), "push", id="priority-of-access"),
    ],
)
def test_vlan_action(before: tuple[int, ...], after: tuple[int, ...], action: str) -> None:
    assert vlan_action(replace(FRAME, vids=before), replace(FRAME, vids=after)) == action


@pytest.mark.parametrize(
    ("vids", "pvid", "inside"),
    [
        pytest.param((), 0, (), id="untagged"),
        pytest.param((), 10, (10,), id="access"),
        pytest.param((0,), 0, (), id="priority"),
        pytest.param((0,), 10, (10,), id="priority-of-access"),
        pytest.param((20,), 10, (20,), id="trunk"),
        pytest.param((20, 5), 10, (20, 5), id="stacked"),
    ],
)
def test_what_a_switch_makes_of_tags(vids: tuple[int, ...], pvid: int, inside: tuple[int, ...]) -> None:
    assert replace(FRAME, vids=vids).inside(pvid).vids == inside


def test_octets_are_a_frame() -> None:
    frame = Ether(replace(FRAME, vids=(10, 20), service=True, size=100).octets())
    assert (frame.dst, frame.src, len(frame)) == (DST, SRC, 108)
    assert (frame[Dot1AD].vlan, frame[Dot1Q].vlan, frame[Dot1Q].type) == (10, 20, 0x88B5)


def test_a_tag_beside_the_frame_is_no_part_of_its_length() -> None:
    tagged = replace(FRAME, vids=(10,))
    assert len(tagged.for_tc().octets()) == len(FRAME.for_tc().octets()) == 60


@pytest.mark.parametrize("kind", ["dhcp-server", "router-advertisement"])
def test_guarded_frames_are_what_they_say(kind: Kind) -> None:
    frame = Ether(Sample(BROADCAST, MADE_UP, kind=kind, size=14).octets())
    if kind == "dhcp-server":
        told = frame[IP].chksum
        del frame[IP].chksum
        assert Ether(bytes(frame))[IP].chksum == told
        assert (frame[UDP].sport, frame[UDP].dport) == (67, 68)
    else:
        assert frame[IPv6].hlim == 255
        assert ICMPv6ND_RA in frame


# The command


@pytest.mark.parametrize(
    ("option", "offered"), [("--nic", ["eth1"]), ("--port", ["web1", "db1"])], ids=lambda value: str(value)
)
def test_names_are_completed(option: str, offered: list[str], tmp_path: Path) -> None:
    with served(FakeService(), tmp_path / "api.sock"):
        words = {"COMP_WORDS": f"offload explain --run-dir {tmp_path} {option} ", "COMP_CWORD": "5"}
        asked = CliRunner().invoke(
            main, [], prog_name="offload", env={**words, "_OFFLOAD_COMPLETE": "bash_complete"}
        )
    assert [line.partition(",")[2] for line in asked.stdout.splitlines()] == offered


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["--dst", DST], "Give either --nic or --port", id="neither"),
        pytest.param(["--nic", "eth1", "--dst", "02:15:5d:00:00"], "a MAC as 02:15:5d:00:00:01", id="mac"),
        pytest.param(["--nic", "eth1", "--dst", DST, "--vlan", "4095"], "4095 is not in the range", id="vid"),
        pytest.param(
            ["--nic", "eth1", "--dst", DST, "--service-tag"], "--service-tag needs --vlan", id="tag"
        ),
    ],
)
def test_bad_usage(arguments: list[str], told: str) -> None:
    refused = CliRunner().invoke(main, ["explain", *arguments])
    assert refused.exit_code == 2
    assert told in refused.stderr
