"""What operators see of a switch that carries frames: counters, warnings, metrics. Needs root.

The figures come from the daemon; what was really sent and delivered is known from the test's own frames.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.instance import Instance, config_of
from tests.lab import TPID_8021AD, WIRE_MAC, Lab, Vm, tag, test_frame, wait_until

pytestmark = pytest.mark.slow

WEB1, DB1, SPOOFED = "02:15:5d:00:00:01", "02:15:5d:00:00:02", "02:15:5d:00:00:99"
HOST = "02:15:5d:00:00:aa"
BROADCAST = "ff:ff:ff:ff:ff:ff"
COUNT = 20


@pytest.fixture
def shown(lab: Lab) -> Iterator[tuple[Lab, Instance, Vm, Vm]]:
    """An external switch with the host and two VMs that have been heard."""
    web1, db1 = lab.vm("web1", mac=WEB1), lab.vm("db1", mac=DB1)
    config = config_of(lab.nic, {"web1": WEB1, "db1": DB1})
    config["switches"]["ext0"]["host"] = {
        "interface": "ext0-host",
        "mac": HOST,
        "addresses": ["192.0.2.1/24"],
    }
    config["metrics"] = {"listen": "127.0.0.1:19808"}
    with Instance(lab.host, config) as instance:
        instance.start(speaking=(web1, db1))
        yield lab, instance, web1, db1


def counted(instance: Instance, port: str) -> dict[str, dict[str, int]]:
    """Frames of a port by direction and path, and its drops."""
    counters = instance.port(port)["counters"]
    paths = {
        way: {path: traffic["packets"] for path, traffic in counters[way].items()} for way in ("rx", "tx")
    }
    return {**paths, "drops": counters["drops"]}


def switch(instance: Instance) -> dict[str, Any]:
    (view,) = instance.json("switches")
    return dict(view)


def host_rx(instance: Instance) -> dict[str, int]:
    """Frames towards the host by path."""
    counters = switch(instance)["host_interface"]["counters"]
    return {path: traffic["packets"] for path, traffic in counters["rx"].items()}


def frames(dst: str, src: str, tags: bytes = b"") -> list[bytes]:
    return [test_frame(dst, src, seq=seq, tags=tags) for seq in range(COUNT)]


def metrics(lab: Lab) -> str:
    def read() -> str:
        with urllib.request.urlopen("http://127.0.0.1:19808/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    return lab.host.call(read)


def test_each_path_and_each_drop_is_shown(shown: tuple[Lab, Instance, Vm, Vm]) -> None:
    lab, instance, web1, _ = shown
    before = counted(instance, "web1")
    web1.ns.send("eth0", frames(DB1, WEB1))
    web1.ns.send("eth0", frames(WIRE_MAC, WEB1))
    web1.ns.send("eth0", frames(BROADCAST, WEB1))
    web1.ns.send("eth0", frames(WIRE_MAC, SPOOFED))
    web1.ns.send("eth0", frames(WIRE_MAC, WEB1, tags=tag(7)))
    web1.ns.send("eth0", frames("01:80:c2:00:00:0e", WEB1))
    lab.wire.send("wire0", frames(WEB1, WIRE_MAC))
    lab.wire.send("wire0", frames(HOST, WIRE_MAC))
    lab.wire.send("wire0", frames(HOST, WIRE_MAC, tags=tag(0, tpid=TPID_8021AD)))

    def all_there() -> bool:
        sent = counted(instance, "web1")
        return (
            sum(sent["tx"].values()) >= sum(before["tx"].values()) + 3 * COUNT
            and sent["rx"]["queue"] >= COUNT
            and sum(host_rx(instance).values()) >= 2 * COUNT
        )

    wait_until(all_there, "everything is counted")
    web1_now, db1_now = counted(instance, "web1"), counted(instance, "db1")
    grown = {path: web1_now["tx"][path] - before["tx"][path] for path in web1_now["tx"]}
    assert grown == {"local": COUNT, "direct": COUNT, "bridge": COUNT}
    assert web1_now["drops"] == {"vlan": COUNT, "spoofed": COUNT, "link_local": COUNT}
    assert web1_now["rx"]["queue"] == COUNT
    assert db1_now["rx"]["local"] == COUNT
    assert db1_now["rx"]["bridge"] >= COUNT

    view = switch(instance)
    assert view["host_interface"]["addresses"] == ["192.0.2.1/24"]
    assert sum(host_rx(instance).values()) == 2 * COUNT  # from the wire, and the broadcasts of web1
    assert view["networks"] == [{"vlan": None, "ports": ["web1", "db1"], "host": True}]
    assert view["default_path"]["from_ports"]["packets"] >= COUNT
    default = next(queue for queue in instance.json("queues") if queue["id"] == 0)
    assert default["drops_by_reason"] == {"vlan": COUNT}

    text = metrics(lab)
    labels = 'port="web1",switch="ext0"'
    assert f'offload_port_drops_total{{port="web1",reason="spoofed",switch="ext0"}} {COUNT}.0' in text
    assert f'offload_port_packets_total{{direction="tx",path="direct",{labels}}} {COUNT}.0' in text
    assert f'offload_queue_drops_total{{nic="{lab.nic}",queue="0",reason="vlan"}} {COUNT}.0' in text


def test_rates_are_those_of_the_traffic(shown: tuple[Lab, Instance, Vm, Vm]) -> None:
    """What is sent while ``top`` looks, and nothing else; it says itself how long it looked."""
    lab, instance, _, _ = shown
    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(instance.json, "top", "--interval", "4")
        sent = 0
        while not look.done():
            lab.wire.send("wire0", frames(WEB1, WIRE_MAC))
            sent += COUNT
            time.sleep(0.05)
    view = look.result()
    assert view["seconds"] >= 4
    ports = {port["name"]: port for port in view["ports"]}
    found = ports["web1"]["rx"]["queue"]
    assert 0 < found["packets"] * view["seconds"] <= sent
    assert found["bytes"] == pytest.approx(found["packets"] * len(frames(WEB1, WIRE_MAC)[0]))
    assert ports["db1"]["rx"]["queue"]["packets"] == 0
    rates = {port: queue["rate"] for queue in view["queues"] for port in queue["ports"]}
    assert rates["web1"]["packets"] == pytest.approx(found["packets"], rel=0.2)  # asked for just after
    assert rates["db1"]["packets"] == 0
    assert sum(cpu["busy"] for cpu in view["cpus"]) > 0


def test_an_address_that_the_wire_uses_too_is_a_warning(shown: tuple[Lab, Instance, Vm, Vm]) -> None:
    lab, instance, web1, _ = shown
    assert not [warning for warning in instance.json("status")["warnings"] if WEB1 in warning]
    lab.wire.send("wire0", [test_frame(BROADCAST, WEB1, seq=1)])
    instance.wait_port("web1", moves=1)
    assert instance.port("web1")["stations"] == [{"mac": WEB1, "state": "away", "moves": 1}]
    (warning,) = [warning for warning in instance.json("status")["warnings"] if WEB1 in warning]
    assert warning.startswith(f"{WEB1} of port web1 is heard from {lab.nic}: ")
    web1.announce()
    wait_until(lambda: instance.port("web1")["stations"][0]["state"] == "here", "it is back")
    (warning,) = [warning for warning in instance.json("status")["warnings"] if WEB1 in warning]
    assert warning.startswith(f"{WEB1} of port web1 was also heard from {lab.nic}, 1 time: ")
    assert 'offload_port_moves_total{port="web1",switch="ext0"} 1.0' in metrics(lab)


def test_what_the_fast_path_passes_by_is_said_by_plan_apply_and_doctor(
    shown: tuple[Lab, Instance, Vm, Vm],
) -> None:
    lab, instance, _, _ = shown
    tbf = ("tbf", "rate", "1gbit", "burst", "1m", "latency", "1ms")
    lab.host.run("tc", "qdisc", "add", "dev", "web1", "root", *tbf)
    warning = (
        "port web1: frames on the fast path pass by the tc qdisc tbf of web1; "
        "`queue: off` on the port sends them through it again"
    )
    assert instance.json("plan", str(instance.file))["warnings"] == [warning]
    assert instance.json("apply", "--dry-run", str(instance.file))["warnings"] == []  # the same text
    (finding,) = [each for each in instance.json("doctor")["findings"] if each["check"] == "bypassed"]
    assert (finding["level"], finding["subject"]) == ("warn", "port web1")
