"""A port's queue on virtio-net with several queues, by its real driver: native XDP behind each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instance import Instance, config_of, vms_of
from tests.lab import WIRE_MAC, test_frame, udp4
from tests.vm.inside.cards import Cards, cards
from tests.vm.nics import NICS

FLOWS = 60


@pytest.fixture(scope="module")
def place() -> Path:
    """The near card on the bus. Scope: one module."""
    return Path("/sys/class/net", cards("virtio_net")[0], "device").resolve()


@pytest.fixture
def lab(place: Path) -> Iterator[Cards]:
    """Two cards on a wire. Scope: one test."""
    with Cards("virtio_net") as lab:
        yield lab


def interrupts(place: Path) -> dict[str, int]:
    """How often each of the card's input queues raised its interrupt."""
    lines = Path("/proc/interrupts").read_text().splitlines()
    found = [re.search(rf" {place.name}-(input\.\d+)$", line) for line in lines]
    return {
        name[1]: sum(int(word) for word in line.split()[1:] if word.isdigit())
        for line, name in zip(lines, found, strict=True)
        if name
    }


def test_a_port_s_frames_come_by_every_queue_and_native_xdp(lab: Cards, place: Path) -> None:
    vms = vms_of(lab, 1)
    [vm] = vms.values()
    with Instance(lab.host, config_of(lab.nic, {name: one.mac for name, one in vms.items()})) as daemon:
        daemon.start(speaking=vms.values())
        lab.wait_link()
        assert daemon.port("web1")["path"] == "queue"
        before = interrupts(place)
        flows = [
            udp4(vm.mac, WIRE_MAC, "192.0.2.11", f"192.0.2.{20 + number}", b"%64d" % number)
            for number in range(FLOWS)
        ]
        with vm.capture() as seen:
            lab.wire.send(lab.wire_end, flows)
            assert sorted(seen.wait_for(FLOWS)) == sorted(flows)
        moved = [name for name, number in interrupts(place).items() if number > before[name]]
        assert len(moved) == NICS["virtio_net"].pairs  # the driver takes all of them with XDP
        assert (
            sum(row[way]["packets"] for row in daemon.per_cpu("web1") for way in ("direct", "handed"))
            == FLOWS
        )
        with lab.wire.capture(lab.wire_end) as outside:
            back = test_frame(WIRE_MAC, vm.mac, 1)
            vm.send([back])
            assert outside.wait_for(1) == [back]
