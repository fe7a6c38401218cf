"""Route netlink on the real kernel: what is set can be read back. Needs root.

``ip`` and ``bridge`` are the second opinion: what Links sets they show, what they set Links shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.errors import KernelError, PrivilegeError
from offload.kernel.links import LinkEvent, Links
from tests.lab import AS_NOBODY, Lab, wait_until, xdp_pass
from tests.snapshot import settled

MAC = "02:15:5d:00:00:01"
OTHER_MAC = "02:15:5d:00:00:02"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def links(lab: Lab) -> Iterator[Links]:
    """Links of the lab's host namespace."""
    with Links(lab.host.path) as opened:
        yield opened


def shown_by_ip(lab: Lab, device: str) -> dict[str, Any]:
    (shown,) = json.loads(lab.host.ip(f"-json -details -statistics link show dev {device}"))
    return dict(shown)


def shown_by_bridge(lab: Lab, device: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        lab.host.run("bridge", "-json", "fdb", "show", "dev", device).stdout
    )
    return found


def entries(links: Links) -> set[tuple[int, str]]:
    """Static entries in whichever VLAN: a kernel that filters them puts one into the default VLAN as well."""
    return {(ifindex, mac) for ifindex, mac, _ in links.static_fdb()}


def test_snapshot_shows_what_ip_shows(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    lab.tap("tap1", queues=2, mtu=1400)
    lab.host.ip(f"link set {lab.nic} alias uplink promisc on")
    found = links.snapshot()
    assert set(found) == {"lo", lab.nic, "web1", "tap1"}
    for name, link in found.items():
        shown = shown_by_ip(lab, name)
        assert link.ifindex == shown["ifindex"]
        assert link.mac == shown["address"]
        assert link.mtu == shown["mtu"]
        assert link.kind == shown.get("linkinfo", {}).get("info_kind")
        assert (link.rx_queues, link.tx_queues) == (shown["num_rx_queues"], shown["num_tx_queues"])
        assert link.up is ("UP" in shown["flags"])
        assert link.promiscuous is ("PROMISC" in shown["flags"])
        assert link.alias == shown.get("ifalias")
        assert link.rx_dropped == shown["stats64"]["rx"]["dropped"]
        assert link.tx_dropped == shown["stats64"]["tx"]["dropped"]
    assert found["tap1"].kind == "tun"
    assert found["lo"].kind is None
    assert found[lab.nic].alias == "uplink"
    assert (found["web1"].master, found["web1"].learning, found["web1"].xdp_mode) == (None, None, None)


def test_drops_are_counted(lab: Lab, links: Links) -> None:
    """A tap whose queue nobody reads drops what does not fit."""
    lab.tap("tap1")
    lab.host.ip("link set tap1 txqueuelen 1")
    lab.host.send("tap1", [bytes(60)] * 50)
    assert links.snapshot()["tap1"].tx_dropped > 0


def test_peer_is_read_without_entering_its_namespace(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    lab.host.ip("link add here0 type veth peer name here1")
    found = links.snapshot()
    inner = links.peer(found["web1"])
    assert (inner.name, inner.mac, inner.up) == ("eth0", MAC, True)
    assert found["web1"].peer_netnsid is not None
    assert found["here0"].peer_netnsid is None
    assert links.peer(found["here0"]).name == "here1"
    assert links.netnsid(lab.namespace("nobody").path) == -1
    with pytest.raises(KernelError, match="lo: its other end"):
        links.peer(found["lo"])


def test_xdp_program_is_shown_with_its_mode(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    for device, mode in (("web1", "native"), (lab.nic, "generic")):
        program = xdp_pass(lab.host, device, native=mode == "native")
        link = links.snapshot()[device]
        assert (link.xdp_mode, link.xdp_prog_id) == (mode, program)


def test_bridge_is_quiet_and_keeps_its_address(lab: Lab, links: Links) -> None:
    ifindex = links.create_bridge("ext0", "ours: ext0", vlan_filtering=False)
    bridge = links.snapshot()["ext0"]
    assert (bridge.ifindex, bridge.kind, bridge.alias, bridge.up) == (ifindex, "bridge", "ours: ext0", False)
    assert int(bridge.mac[:2], 16) & 3 == 2, "locally administered, not a group"
    settings = shown_by_ip(lab, "ext0")["linkinfo"]["info_data"]
    assert (settings["stp_state"], settings["forward_delay"], settings["mcast_snooping"]) == (0, 0, 0)
    lab.host.ip("link add low address 00:00:5e:00:53:01 type veth peer name low1")
    links.set_master(links.snapshot()["low"].ifindex, ifindex)
    assert links.snapshot()["ext0"].mac == bridge.mac
    with pytest.raises(KernelError, match=r"^ext0: cannot make the bridge: File exists.*choose another"):
        links.create_bridge("ext0", "again", vlan_filtering=False)
    links.delete_link(ifindex)
    links.delete_link(ifindex)
    assert "ext0" not in links.snapshot()


def test_bridge_port_flags_and_master(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=False)
    port = links.snapshot()["web1"].ifindex
    with pytest.raises(KernelError, match=r"^web1: cannot set its bridge port flags"):
        links.set_bridge_port(port, False, False, 0)
    links.set_master(port, bridge)
    before = links.snapshot()["web1"]
    assert (before.master, before.master_name) == (bridge, "ext0")
    assert (before.learning, before.unicast_flood, before.group_forward) == (True, True, 0)
    for flags in ((False, False, 0xFFFD), (True, False, 0), (False, True, 1 << 14), (True, True, 0)):
        links.set_bridge_port(port, *flags)
        after = links.snapshot()["web1"]
        assert (after.learning, after.unicast_flood, after.group_forward) == flags
    shown = shown_by_ip(lab, "web1")["linkinfo"]["info_slave_data"]
    assert (shown["learning"], shown["flood"], shown["group_fwd_mask"]) == (True, True, "0")
    links.set_master(port, 0)
    assert links.snapshot()["web1"].master is None


def test_promiscuity_is_the_user_s_own(lab: Lab, links: Links) -> None:
    """What a bridge holds does not show, and letting go of ours leaves the bridge's."""
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=False)
    nic = links.snapshot()[lab.nic].ifindex
    links.set_master(nic, bridge)
    assert links.snapshot()[lab.nic].promiscuous is False
    links.set_promiscuous(nic, True)
    links.set_promiscuous(nic, True)
    assert links.snapshot()[lab.nic].promiscuous is True
    assert shown_by_ip(lab, lab.nic)["promiscuity"] == 2
    links.set_promiscuous(nic, False)
    assert links.snapshot()[lab.nic].promiscuous is False
    assert shown_by_ip(lab, lab.nic)["promiscuity"] == 1


def test_up_and_down(lab: Lab, links: Links) -> None:
    nic = links.snapshot()[lab.nic].ifindex
    links.set_up(nic, False)
    down = links.snapshot()[lab.nic]
    assert (down.up, down.running) == (False, False)
    links.set_up(nic, True)
    assert links.snapshot()[lab.nic].up is True


def test_static_entries_only(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    lab.vm("web2", mac=OTHER_MAC)
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=False)
    found = links.snapshot()
    web1, web2 = found["web1"].ifindex, found["web2"].ifindex
    for ifindex in (bridge, web1, web2):
        links.set_up(ifindex, True)
    links.set_master(web1, bridge)
    links.set_master(web2, bridge)
    settled(lab.host)
    lab.host.run("bridge", "fdb", "add", "02:15:5d:00:00:77", "dev", "web1", "master", "dynamic")
    assert links.static_fdb() == set(), "own addresses and dynamic entries are not static ones"
    links.add_fdb(web1, MAC)
    links.add_fdb(web1, MAC)
    links.add_fdb(web2, OTHER_MAC)
    assert entries(links) == {(web1, MAC), (web2, OTHER_MAC)}
    # A kernel with VLAN filtering has one more for the bridge's default VLAN.
    shown = [entry for entry in shown_by_bridge(lab, "web1") if entry["mac"] == MAC]
    assert {(entry["state"], entry["master"]) for entry in shown} == {("static", "ext0")}
    links.add_fdb(web2, MAC)
    assert entries(links) == {(web2, MAC), (web2, OTHER_MAC)}, "the entry moved"
    links.del_fdb(web1, MAC)
    assert (web2, MAC) in entries(links), "an entry of another port is not ours to delete"
    links.del_fdb(web2, MAC)
    links.del_fdb(web2, MAC)
    assert entries(links) == {(web2, OTHER_MAC)}


def test_static_entry_replaces_a_learnt_one(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC)
    lab.vm("web2", mac=OTHER_MAC)
    bridge = links.create_bridge("ext0", "ours", vlan_filtering=False)
    web1, web2 = (links.snapshot()[name].ifindex for name in ("web1", "web2"))
    links.set_master(web1, bridge)
    links.set_master(web2, bridge)
    links.set_up(bridge, True)
    settled(lab.host)  # a port without a carrier cannot learn
    lab.host.run("bridge", "fdb", "add", MAC, "dev", "web2", "master", "dynamic")
    links.add_fdb(web1, MAC)
    links.add_fdb(web2, OTHER_MAC)
    assert entries(links) == {(web1, MAC), (web2, OTHER_MAC)}
    assert {entry[:2] for entry in links.static_fdb(web1)} == {(web1, MAC)}


def test_fdb_of_a_device_that_is_no_port(lab: Lab, links: Links) -> None:
    with pytest.raises(
        KernelError, match=f"^{lab.nic}: cannot add forwarding entry {MAC}: it is in no bridge"
    ):
        links.add_fdb(links.snapshot()[lab.nic].ifindex, MAC)
    links.del_fdb(links.snapshot()[lab.nic].ifindex, MAC)


def test_global_addresses(make_lab: Any) -> None:
    lab = make_lab(ipv6=True)
    lab.host.ip(f"address add 192.0.2.1/24 dev {lab.nic}")
    lab.host.ip(f"address add 169.254.7.7/16 dev {lab.nic}")
    lab.host.ip(f"address add 198.51.100.1 peer 198.51.100.2/32 dev {lab.nic}")
    lab.host.ip(f"address add 2001:db8::1/64 dev {lab.nic}")
    lab.host.ip("address add 203.0.113.1/24 dev lo")
    with Links(lab.host.path) as links:
        nic = links.snapshot()[lab.nic].ifindex
        assert sorted(links.global_addresses(nic)) == ["192.0.2.1/24", "198.51.100.1/32", "2001:db8::1/64"]


def test_ipv6_switch(make_lab: Any) -> None:
    lab = make_lab(ipv6=True)
    with Links(lab.host.path) as links:
        assert links.ipv6_disabled(lab.nic) is False
        links.set_ipv6_disabled(lab.nic, True)
        assert links.ipv6_disabled(lab.nic) is True
        assert lab.host.call(Path(f"/proc/sys/net/ipv6/conf/{lab.nic}/disable_ipv6").read_text) == "1\n"
        links.set_ipv6_disabled(lab.nic, False)
        assert links.ipv6_disabled(lab.nic) is False
        assert links.ipv6_disabled("gone0") is None
        links.set_ipv6_disabled("gone0", True)
        with pytest.raises(KernelError, match="gone0: cannot switch IPv6 on"):
            links.set_ipv6_disabled("gone0", False)


def test_a_device_that_is_gone_is_named(lab: Lab, links: Links) -> None:
    with pytest.raises(KernelError, match=r"^ifindex 9999: cannot set it up: No such device.*ip link"):
        links.set_up(9999, True)


def test_a_device_is_read_as_all_are(lab: Lab, links: Links) -> None:
    lab.vm("web1", mac=MAC).announce()
    wait_until(lambda: links.snapshot()["web1"].rx_packets > 0, "a frame is counted")
    web1 = links.snapshot()["web1"]
    still = replace(web1, rx_packets=0, rx_bytes=0, rx_dropped=0, tx_dropped=0)
    assert links.snapshot(counts=False)["web1"] == links.find("web1", counts=False) == still
    assert links.at(web1.ifindex) == links.find("web1") == web1
    lab.host.ip("link set web1 mtu 1400")
    assert links.snapshot(counts=False)["web1"].mtu == links.snapshot()["web1"].mtu == 1400
    assert links.at(9999) is None


def test_events_wake_an_event_loop(lab: Lab, links: Links) -> None:
    async def first_events() -> list[LinkEvent]:
        loop = asyncio.get_running_loop()
        with closing(links.events()) as events:
            assert events.drain() == []
            woken = asyncio.Event()
            loop.add_reader(events.fileno(), woken.set)
            lab.host.ip("link add web1 type veth peer name web1p")
            await asyncio.wait_for(woken.wait(), 5)
            loop.remove_reader(events.fileno())
            assert "web1" in links.snapshot(), "requests work while a loop runs in this thread"
            bridge = links.create_bridge("ext0", "ours", vlan_filtering=False)
            web1 = links.snapshot()["web1"].ifindex
            links.set_master(web1, bridge)
            events.drain()
            links.set_master(web1, 0)
            left = events.drain()
            assert all(event.kind == "changed" for event in left if event.ifindex == web1), "left, not gone"
            assert any(event.ifindex == web1 for event in left)
            links.delete_link(web1)
            return events.drain()

    events = asyncio.run(first_events())
    assert {event.name for event in events if event.kind == "gone"} == {"web1", "web1p"}


def test_an_overrun_is_told(lab: Lab, links: Links) -> None:
    """Nobody drains while the kernel speaks more than the socket holds."""
    nic = links.snapshot()[lab.nic].ifindex
    with links.events() as events:
        with socket.socket(fileno=os.dup(events.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(20):
            links.set_promiscuous(nic, True)
            links.set_promiscuous(nic, False)
        assert LinkEvent(0, "", "resync") in events.drain()
        links.set_promiscuous(nic, True)
        assert [event.kind for event in events.drain()] == ["changed"], "it hears again"


def test_without_privilege_the_error_says_so(lab: Lab) -> None:
    """A child without capabilities may look, not touch."""
    script = (
        "from offload.kernel.links import Links\n"
        "from offload.errors import PrivilegeError\n"
        "links = Links()\n"
        "nic = links.snapshot()['eth1'].ifindex\n"
        "try:\n"
        "    links.set_up(nic, False)\n"
        "except PrivilegeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        lab.host.argv(*AS_NOBODY, sys.executable, "-c", script),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=30,
        check=False,
    )
    assert done.stdout.startswith("eth1: cannot set it down: Operation not permitted (needs CAP_NET_ADMIN"), (
        done
    )
    assert PrivilegeError.exit_code == 4


def test_a_thousand_links_are_read_in_a_moment(lab: Lab, links: Links) -> None:
    lines = [f"link add p{number} type veth peer name q{number}" for number in range(500)]
    argv = ["ip", "-n", lab.host.name, "-batch", "-"]
    subprocess.run(argv, input="\n".join(lines), text=True, check=True, timeout=30)
    start = time.process_time()
    found = links.snapshot()
    seconds = time.process_time() - start
    assert len(found) == 1002
    assert seconds < 0.5, "about 0.04 s on two slow cores; decoding everything takes 0.2 s"
    print(f"{len(found)} links in {seconds * 1000:.0f} ms")
