"""The Python bridge's process, without a controller: the tests stand in for the switch's tc programs. Needs
root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from offload.bridge.membership import FloodLimit, membership_file
from tests.lab import Capture, Lab, Namespace, seq_of, tag, test_frame, wait_until
from tests.netns.conduit import (
    INNER,
    MTU,
    SWITCH,
    Bridge,
    conduit_frame,
    configured,
    member,
    service_tag,
)

pytestmark = pytest.mark.slow

A, B, C, NOBODY = (f"02:00:00:00:00:0{digit}" for digit in "abcf")
BROADCAST = "ff:ff:ff:ff:ff:ff"
LLDP = "01:80:c2:00:00:0e"

MakeBridge = Callable[..., Bridge]


@pytest.fixture
def make_bridge(lab: Lab) -> Iterator[MakeBridge]:
    """Start bridges in the laboratory: ``make_bridge(member(1, "a"), ...)``. Scope: one test."""
    with ExitStack() as bridges:
        yield lambda *members, **more: bridges.enter_context(Bridge(lab, *members, **more))


def outlet(frame: bytes) -> int:
    """The member that a frame on the conduit is for."""
    assert frame[12:14] == b"\x88\xa8"
    return int.from_bytes(frame[14:16])


def outlets(seen: Capture, count: int) -> list[int]:
    """The members that so many frames are for, and that no more come."""
    found = [outlet(frame) for frame in seen.wait_for(count)]
    assert seen.extra(count) == []
    seen.forget()
    return sorted(found)


@pytest.mark.parametrize("number", [1, 0x0FFF, 0x1001, 0xFFFF], ids="{:#x}".format)
def test_all_sixteen_bits_of_the_tag_are_the_member(lab: Lab, make_bridge: MakeBridge, number: int) -> None:
    make_bridge(member(number, "a"), member(2, "b"))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(number, BROADCAST, A, 1), conduit_frame(2, A, B, 2)])
        assert [bytes(frame) for frame in seen.wait_for(2)] == [
            conduit_frame(2, BROADCAST, A, 1),
            conduit_frame(number, A, B, 2),
        ]
        assert seen.extra(2) == []


def test_learns_and_keeps_vlans_apart(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(
        member(1, "a", vids={0, 10}), member(2, "b", vids={10}), member(3, "c", vids={0, 20}), member(4, "d")
    )
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, vid=10)])
        assert outlets(seen, 1) == [2]
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, vid=0)])
        assert outlets(seen, 2) == [3, 4], "VID 0 is no VLAN"
        lab.host.send(SWITCH, [conduit_frame(2, A, B, vid=10)])
        assert outlets(seen, 1) == [1]
        lab.host.send(SWITCH, [conduit_frame(3, A, C)])
        assert outlets(seen, 1) == [1]
        lab.host.send(SWITCH, [conduit_frame(2, A, B), conduit_frame(3, A, C, vid=10)])
        seen.assert_silent()
    found = bridge.settled()
    assert {item.name: dict(item.drops) for item in found.members} == {
        "a": {}, "b": {"vlan": 1}, "c": {"vlan": 1}, "d": {}
    }  # fmt: skip
    assert {(item.mac, item.vid, item.member) for item in found.stations} == {
        (A, 0, "a"), (A, 10, "a"), (B, 10, "b"), (C, 0, "c")
    }  # fmt: skip


def test_the_tag_and_the_bytes_stay_as_they_came(lab: Lab, make_bridge: MakeBridge) -> None:
    make_bridge(member(1, "a", vids={10}), member(2, "b", vids={10}))
    odd = [
        test_frame(BROADCAST, A, 1, tags=service_tag(1) + tag(10, pcp=5, dei=1), size=61),
        test_frame(BROADCAST, A, 2, tags=service_tag(1) + tag(10) + tag(3), size=1514),
        test_frame(BROADCAST, A, 3, tags=service_tag(1) + tag(10), size=MTU + 14 - 8),
    ]
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, odd)
        assert seen.wait_for(3) == [frame[:12] + service_tag(2) + frame[16:] for frame in odd]


def test_who_is_nobody_is_dropped_and_counted(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(9, BROADCAST, A), test_frame(BROADCAST, A, tags=tag(1))])
        lab.host.send(SWITCH, [test_frame(BROADCAST, A)])
        seen.assert_silent()
    drops = bridge.settled().drops
    assert (drops["unknown_member"], drops["malformed"]) == (1, 2)


def test_members_change_while_frames_flow(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
        assert outlets(seen, 1) == [2]
        bridge.tell(member(1, "a"), member(3, "c", learn=False, macs=(C,)), flood_limit=FloodLimit(0.001, 2))
        bridge.wait_for("c is a member", lambda found: [item.id for item in found.members] == [1, 3])
        lab.host.send(SWITCH, [conduit_frame(3, A, C), conduit_frame(1, C, A)])
        assert outlets(seen, 2) == [1, 3], "what was learnt of a is still known, c was declared"
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, number) for number in range(10)])
        assert outlets(seen, 2) == [3, 3]
        membership_file(bridge.directory, SWITCH).write_text("{")
        bridge.wait_for("it says what is wrong", lambda found: "must be JSON" in found.config_error)
        lab.host.send(SWITCH, [conduit_frame(3, A, C)])
        assert outlets(seen, 1) == [1], "the last good membership is in force"
        os.kill(bridge.state().pid, signal.SIGKILL)
        lab.host.send(SWITCH, [conduit_frame(1, C, A)])
        assert outlets(seen, 1) == [3], "and a new worker has it, too"
    found = bridge.settled()
    assert found.members[0].drops["flood_limit"] == 8
    assert found.members[0].rx_packets >= 12
    assert "member b: gone" in bridge.said()


def test_the_inner_device_comes_late_goes_and_comes_back(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    for _ in range(2):
        lab.host.ip(f"link delete {SWITCH}")
        bridge.wait_for("it waits", lambda found: not found.bound)
        bridge.make_conduit()
        bridge.wait_for("it reads again", lambda found: found.bound)
        with lab.host.capture(SWITCH) as seen:
            lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
            assert outlets(seen, 1) == [2]
    assert bridge.said().count("the device is gone") == 2
    lab.host.ip(f"link set {INNER} down")
    lab.host.ip(f"link set {INNER} up")
    with lab.host.capture(SWITCH) as seen:
        wait_until(lambda: lab.host.ip(f"link show {SWITCH}").count("LOWER_UP") == 1, "the conduit is up")
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
        assert outlets(seen, 1) == [2]


def test_an_mtu_too_small_for_the_tag_is_counted_and_named(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    lab.host.ip(f"link set {INNER} mtu 1500")
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(
            SWITCH, [conduit_frame(1, BROADCAST, A, 1, size=1514), conduit_frame(1, BROADCAST, A, 2)]
        )
        assert seq_of(seen.wait_for(1)[0]) == 2
    found = bridge.settled()
    assert (found.members[1].drops["too_big"], found.members[1].tx_packets) == (1, 1)
    assert "MTU is too small for 1518 bytes" in bridge.said()


# With real TCP


@pytest.mark.parametrize("vid", [0, 10], ids=["untagged", "access VLAN"])
def test_tcp_keeps_its_segments_whole_and_its_checksums_right(
    lab: Lab, make_bridge: MakeBridge, vid: int
) -> None:
    vms = [
        lab.vm(name, mac, f"{ip}/24")
        for name, mac, ip in (("web1", A, "192.0.2.11"), ("web2", B, "192.0.2.12"))
    ]
    bridge = make_bridge(member(0x1001, "web1", vids={vid}), member(0xF002, "web2", vids={vid}))
    bridge.connect({"web1": vid, "web2": vid}, *vms)
    sent = iperf(vms[0].ns, vms[1].ns, "192.0.2.12", 1.0)
    assert sent > 20_000_000
    web1, web2 = bridge.settled().members
    assert web1.rx_bytes / web1.rx_packets > 20_000, "frames on the bridge are no GSO frames any more"
    assert web2.tx_packets == web1.rx_packets
    assert not web1.drops
    assert not web2.drops
    errors = vms[1].ns.run("nstat", "-asz", "TcpInCsumErrors", "TcpInErrs").stdout
    assert [line.split()[1] for line in errors.splitlines()[1:]] == ["0", "0"]


def iperf(client: Namespace, server: Namespace, address: str, seconds: float) -> int:
    """Bytes that one TCP stream brought across."""
    process = server.popen("iperf3", "-s", "-1")
    try:
        wait_until(lambda: ":5201" in server.run("ss", "-ltn").stdout, "iperf3 listens")
        done = client.run("iperf3", "-c", address, "-t", str(seconds), "-J")
    finally:
        process.kill()
        process.communicate()
    return int(json.loads(done.stdout)["end"]["sum_received"]["bytes"])


# Extensions

DECIDES = """
from offload.bridge.extension import DROP, FORWARD, Extension, redirect

class Lab(Extension):
    def __init__(self, options, switch):
        self.to = options["to"]
        self.seen = 0

    def frame(self, frame):
        self.seen += 1
        number = frame.data[len(frame.data) - 1]
        return {1: DROP, 2: redirect(self.to)}.get(number, FORWARD)

    def counters(self):
        return {"seen": self.seen}
"""

FAILS = """
import os, time
from offload.bridge.extension import Extension, FORWARD

class Lab(Extension):
    def __init__(self, options, switch):
        self.how = options["how"]

    def frame(self, frame):
        if frame.dst == bytes.fromhex("0200000000ff"):
            if self.how == "raises":
                raise RuntimeError("on purpose")
            if self.how == "exits":
                os._exit(2)
            if self.how == "crashes":
                import ctypes
                ctypes.string_at(0)
            if self.how == "is killed":
                os.kill(os.getpid(), 9)
            while True:
                time.sleep(0.01)
        return FORWARD
"""
TRIGGER = "02:00:00:00:00:ff"


def last_byte(value: int, seq: int) -> bytes:
    return conduit_frame(1, BROADCAST, A, seq)[:-1] + bytes([value])


def test_an_extension_drops_and_redirects(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(
        *(member(1, "a"), member(2, "b"), member(3, "c"), member(4, "d", vids={10})),
        installed={"decides": DECIDES},
        extensions=(configured("decides", to="c"),),
    )
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [last_byte(0, 1), last_byte(1, 2), last_byte(2, 3)])
        frames = seen.wait_for(3)
        assert seen.extra(3) == []
        assert sorted((seq_of(frame), outlet(frame)) for frame in frames) == [(1, 2), (1, 3), (3, 3)]
        bridge.tell(extensions=(configured("decides", to="d"),))
        bridge.wait_for("the new options are in force", lambda found: found.restarts.config == 1)
        seen.forget()
        lab.host.send(SWITCH, [last_byte(2, 4)])
        seen.assert_silent()
    found = bridge.settled()
    assert found.members[0].drops == {"extension": 1, "vlan": 1}
    assert found.members[0].rx_packets == 4, "counters went on over the change"
    assert found.extensions[0].counters == {"seen": 1}


@pytest.mark.parametrize("how", ["exits", "crashes", "is killed", "hangs"])
def test_the_default_path_survives_an_extension(lab: Lab, make_bridge: MakeBridge, how: str) -> None:
    bridge = make_bridge(
        *(member(1, "a"), member(2, "b")),
        installed={"fails": FAILS, "decides": DECIDES},
        extensions=(configured("fails", how=how), configured("decides", to="b")),
    )
    before = bridge.state().pid
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, number) for number in range(20)])
        lab.host.send(SWITCH, [conduit_frame(1, TRIGGER, A, 20)])
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, number) for number in range(21, 200)])
        assert [seq_of(frame) for frame in seen.wait_for(200)] == list(range(200)), (
            "none is lost, none comes twice"
        )
        assert seen.extra(200) == []
    found = bridge.wait_for(
        "another worker tells", lambda found: found.pid != before and found.members[1].tx_packets
    )
    assert (found.restarts.extension, found.restarts.other) == (1, 0)
    assert [item.state for item in found.extensions] == ["off", "on"]
    assert ("kept a frame for too long" if how == "hangs" else "ended the process") in found.extensions[
        0
    ].reason or how == "is killed"
    assert "extension fails" in bridge.said()


def test_an_extension_that_raises_is_as_if_absent_and_off_after_ten(
    lab: Lab, make_bridge: MakeBridge
) -> None:
    bridge = make_bridge(
        *(member(1, "a"), member(2, "b")),
        installed={"fails": FAILS},
        extensions=(configured("fails", how="raises"), configured("missing")),
    )
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, TRIGGER, A, number) for number in range(30)])
        assert outlets(seen, 30) == [2] * 30
    fails, missing = bridge.settled().extensions
    assert (fails.state, fails.failures) == ("off", 10)
    assert "RuntimeError: on purpose" in fails.reason
    assert missing.state == "off"
    assert "no extension missing" in missing.reason
    assert bridge.state().restarts.extension == 0


def test_a_worker_that_is_killed_is_followed_by_one_that_knows(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"), member(3, "c"))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 0)])
        seen.wait_for(2)
        seen.forget()
        found = bridge.wait_for(
            "a is known", lambda found: found.stations and found.members[0].rx_packets == 1
        )
        os.kill(found.pid, signal.SIGKILL)
        lab.host.send(SWITCH, [conduit_frame(2, A, B, number) for number in range(300)])
        assert outlets(seen, 300) == [1] * 300
    found = bridge.settled()
    assert found.restarts.other == 1
    assert (found.members[0].rx_packets, found.members[1].rx_packets) == (1, 300)


# The process


def test_ends_on_a_signal_and_goes_on_counting(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
        seen.wait_for(1)
    assert bridge.stop() == 0
    assert bridge.state().members[0].rx_packets == 1, "the last state is written at the end"
    bridge.start()
    assert bridge.state().members[0].rx_packets == 1
    assert [item.mac for item in bridge.state().stations] == [A]


def test_a_dead_supervisor_takes_its_worker_along(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    bridge.stop(signal.SIGKILL)
    bridge.start()
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
        assert outlets(seen, 1) == [2]


def test_waits_for_its_membership_and_refuses_a_wrong_one(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    file = membership_file(bridge.directory, SWITCH)
    good = file.read_text()
    bridge.stop()
    file.unlink()
    bridge.start(bound=False)
    assert "waiting for it" in bridge.said()
    file.write_text(good)
    bridge.wait_for("it has begun", lambda found: found.bound)
    bridge.stop()
    file.write_text(good.replace('"version": 1', '"version": 7'))
    ended = lab.host.run(*bridge.argv(), check=False)
    assert ended.returncode == 2
    assert "version: 7: must be 1" in ended.stderr


def test_only_one_serves_a_switch(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    ended = lab.host.run(*bridge.argv(), check=False)
    assert ended.returncode == 1
    assert "another bridge serves ext0" in ended.stderr


def test_needs_no_privilege_but_cap_net_raw(lab: Lab, make_bridge: MakeBridge) -> None:
    bridge = make_bridge(member(1, "a"), member(2, "b"))
    bridge.stop()
    bridge.start(within=["setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw"])
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A)])
        assert outlets(seen, 1) == [2]
    bridge.stop()
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    ended = lab.host.run(*without, *bridge.argv(), check=False)
    assert ended.returncode == 4
    assert "CAP_NET_RAW" in ended.stderr


# The mirror


def tshark(file: Path, *fields: str) -> list[list[str]]:
    """These fields of every frame, as Wireshark's own reader has them."""
    columns = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(
        ["tshark", "-r", file, "-T", "fields", *columns], capture_output=True, text=True, check=True
    )
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("tshark") is None, reason="no tshark on this machine")
def test_a_mirror_file_has_the_frames_of_its_members_and_no_others(
    lab: Lab, make_bridge: MakeBridge, tmp_path: Path
) -> None:
    file = tmp_path / "web1.pcapng"
    bridge = make_bridge(
        *(member(1, "web1", vids={0, 10}), member(2, "web2"), member(3, "db1", vids={0, 10})),
        extensions=(configured("mirror", file=str(file), members=["web1"]),),
    )
    begun = time.time()
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 1)])  # from web1
        lab.host.send(SWITCH, [conduit_frame(2, A, B, 2)])  # to web1
        lab.host.send(SWITCH, [conduit_frame(3, B, C, 3)])  # neither
        lab.host.send(SWITCH, [conduit_frame(2, BROADCAST, B, 4)])  # to web1 and db1
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 5, vid=10)])
        lab.host.send(SWITCH, [conduit_frame(1, C, A, 6, vid=30)])  # not admitted
        seen.wait_for(2 + 1 + 1 + 2 + 1)
    bridge.wait_for("it is written", lambda found: found.extensions[0].counters["copies"] == 4)
    bridge.stop()
    rows = tshark(
        file,
        "frame.interface_name",
        "frame.packet_flags_direction",
        "eth.src",
        "vlan.id",
        "frame.len",
        "data.data",
    )
    assert [(name, int(way, 0), src, vid, length) for name, way, src, vid, length, _ in rows] == [
        ("web1", 1, A, "", "60"),
        ("web1", 2, B, "", "60"),
        ("web1", 2, B, "", "60"),
        ("web1", 1, A, "10", "64"),
    ]
    assert [seq_of(bytes(14) + bytes.fromhex(row[-1])) for row in rows] == [1, 2, 4, 5]
    times = [float(stamp) for (stamp,) in tshark(file, "frame.time_epoch")]
    assert times == sorted(times)
    assert begun < times[0] <= times[-1] < time.time()
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_mirror_sends_copies_out_of_an_interface(lab: Lab, make_bridge: MakeBridge) -> None:
    lab.host.ip("link add mon0 type veth peer name mon1")
    for end in ("mon0", "mon1"):
        lab.host.ip(f"link set {end} up")
    mirror = configured("mirror", interface="mon0", members=["a"], directions=["from"], vids=[0])
    bridge = make_bridge(member(1, "a", vids={0, 10}), member(2, "b", vids={0, 10}), extensions=(mirror,))
    with lab.host.capture("mon1") as copies, lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 1), conduit_frame(2, A, B, 2)])
        lab.host.send(SWITCH, [conduit_frame(1, B, A, 3, vid=10), conduit_frame(1, B, A, 4)])
        seen.wait_for(4)
        assert copies.wait_for(2) == [test_frame(BROADCAST, A, 1), test_frame(B, A, 4)]
        assert copies.extra(2) == []
        lab.host.ip("link set mon0 down")
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 5)])
        seen.wait_for(5)
        lab.host.ip("link set mon0 up")
        lab.host.send(SWITCH, [conduit_frame(1, BROADCAST, A, 6)])
        assert seq_of(copies.wait_for(3)[2]) == 6
    found = bridge.settled().extensions[0]
    assert (found.state, found.counters["copies"], found.counters["lost"]) == ("on", 3, 1)


def test_a_mirror_has_frames_that_go_nowhere(lab: Lab, make_bridge: MakeBridge, tmp_path: Path) -> None:
    mirror = configured("mirror", file=str(tmp_path / "a.pcapng"))
    bridge = make_bridge(member(1, "a"), member(2, "b"), extensions=(mirror,))
    with lab.host.capture(SWITCH) as seen:
        lab.host.send(SWITCH, [conduit_frame(1, A, A, 1)])
        seen.assert_silent()
    assert bridge.settled().extensions[0].counters == {"copies": 1, "lost": 0}
