"""Hardware queues on the Intel 82576: the NIC sorts by MAC and VLAN into virtual functions, with a daemon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.kernel.irq import interrupts
from tests.lab import WIRE_MAC, Capture, Stream, seq_of, tag, test_frame, wait_until
from tests.vm.inside.functions import COUNT, Site, config_of, own_cards, start

pytestmark = pytest.mark.timeout(600)

VLAN = 10


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """An untagged VM and one in a VLAN, each on a virtual function, and one with a software queue."""
    with own_cards() as lab:
        vms = {f"web{n}": lab.vm(f"web{n}", f"02:15:5d:00:00:0{n}") for n in (1, 2, 3)}
        config = config_of(lab.nic, vms, vfs=2)
        config["ports"]["web1"] |= {"queue": "hardware", "cpu": 1}
        config["ports"]["web2"] |= {"queue": "hardware", "vlan": VLAN, "cpu": 0}
        config["ports"]["web3"] |= {"queue": "software"}
        with start(lab, config, vms) as site:
            yield site


def check_arrives(site: Site, name: str, sent: list[bytes], expected: list[bytes]) -> None:
    """``expected`` comes to this VM, and nothing to any other."""
    with (
        site.vms["web1"].capture() as web1,
        site.vms["web2"].capture() as web2,
        site.vms["web3"].capture() as web3,
    ):
        captures: dict[str, Capture] = {"web1": web1, "web2": web2, "web3": web3}
        site.lab.wire.send(site.lab.wire_end, sent)
        assert sorted(captures[name].wait_for(len(expected), timeout=20)) == sorted(expected)
        for capture in captures.values():
            capture.forget()
            capture.assert_silent()


def test_the_nic_sorts_by_mac_and_vlan(site: Site) -> None:
    queues = site.queues()
    assert {name: (queue["kind"], queue["state"]) for name, queue in queues.items()} == {
        "web1": ("hardware", "running"),
        "web2": ("hardware", "running"),
        "web3": ("software", "running"),
    }
    devices = {name: queue["device"] for name, queue in queues.items()}
    nic = site.lab.nic
    for name, tags in (("web1", b""), ("web2", tag(VLAN))):
        before = {device: site.received(device) for device in (nic, devices["web1"], devices["web2"])}
        check_arrives(site, name, site.frames(name, tags), site.frames(name))
        gained = {device: site.received(device) - count for device, count in before.items()}
        other = devices["web2" if name == "web1" else "web1"]
        assert gained[devices[name]] >= COUNT
        assert gained[nic] < COUNT / 4  # an announcement or two
        assert gained[other] < COUNT / 4
        assert site.queues()[name]["packets"] - queues[name]["packets"] == COUNT
    # What has a software queue comes by the NIC itself, as ever.
    check_arrives(site, "web3", site.frames("web3"), site.frames("web3"))


def test_the_right_mac_in_a_wrong_vlan_reaches_nobody(site: Site) -> None:
    for name, tags in (("web1", tag(VLAN)), ("web2", tag(VLAN + 1)), ("web2", b"")):
        check_arrives(site, name, site.frames(name, tags), [])


def test_broadcast_comes_once(site: Site) -> None:
    """The NIC gives it to every function too."""
    sent = [test_frame("ff:ff:ff:ff:ff:ff", WIRE_MAC, seq) for seq in range(COUNT)]
    with site.vms["web1"].capture() as seen:
        site.lab.wire.send(site.lab.wire_end, sent)
        assert sorted(seen.wait_for(COUNT, timeout=20)) == sorted(sent)
        assert seen.extra(COUNT) == []


def test_a_queue_s_interrupts_are_on_its_cpu(site: Site) -> None:
    """And on no other: /proc/interrupts."""
    device = site.queues()["web1"]["device"]
    irqs = [int(irq.name) for irq in Path("/sys/class/net", device, "device/msi_irqs").iterdir()]
    before = interrupts()
    check_arrives(site, "web1", site.frames("web1"), site.frames("web1"))
    after = interrupts()
    gained = [
        sum(after[irq][cpu] - before[irq][cpu] for irq in irqs if "rx" in name_of(irq)) for cpu in (0, 1)
    ]
    assert gained[0] == 0
    assert gained[1] > 0


def name_of(irq: int) -> str:
    [line] = [
        line
        for line in Path("/proc/interrupts").read_text().splitlines()
        if line.strip().startswith(f"{irq}:")
    ]
    return line.split()[-1]


def test_what_a_paused_port_gets_comes_by_the_nic(site: Site) -> None:
    """In its VLAN too: the function's frames enter the switch where the NIC's do."""
    site.lab.host.ip("link set web2 down")
    site.instance.wait_port("web2", state="paused", timeout=20)
    queue = site.queues()["web2"]
    site.lab.wire.send(site.lab.wire_end, site.frames("web2", tag(VLAN)))
    wait_until(lambda: site.queues()["web2"]["not_taken"].get("passed", 0) >= COUNT, "they are passed on", 10)
    assert site.queues()["web2"]["packets"] == queue["packets"]
    site.lab.host.ip("link set web2 up")
    site.instance.wait_port("web2", state="active", timeout=20)
    site.wait_steered()
    check_arrives(site, "web2", site.frames("web2", tag(VLAN)), site.frames("web2"))


def lost_and_twice(stream: Stream, seen: Capture) -> tuple[int, int]:
    """How many numbered frames of an ended stream have not come, and how many more than once."""
    time.sleep(1)
    numbers = [seq_of(frame) for frame in seen.take()]
    return stream.sent - len(set(numbers)), len(numbers) - len(set(numbers))


def test_what_each_transition_loses(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A port goes from a function to a software queue, to none, and back, under traffic.

    Its address is the function's and the NIC's for a moment: frames may come twice, but none is lost.
    """
    told = []
    for what, queue in (
        ("function to software", "software"),
        ("software to function", "hardware"),
        ("function to bridge", "off"),
        ("bridge to function", "hardware"),
    ):
        with site.vms["web1"].capture() as seen:
            with Stream(site.lab.wire, site.lab.wire_end, site.vms["web1"].mac, rate=1000) as stream:
                stream.run_on(50)
                site.set(web1={"queue": queue})
                stream.run_on(50)
            told.append((what, *lost_and_twice(stream, seen), stream.sent))
    with capsys.disabled():
        for what, gone, twice, sent in told:
            print(f"\n    {what}: {gone} of {sent} frames lost, {twice} twice", end="")
    assert [gone for _, gone, _, _ in told] == [0] * len(told)
