"""The real drivers take the emulated cards that ``--nic`` names, and frames go from one to the other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab import NIC_MAC, WIRE_MAC, test_frame
from tests.vm.inside.cards import Cards, cards
from tests.vm.nics import NICS, near_mac
from tests.vm.options import chosen

COUNT = 60


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("nic", chosen(metafunc.config, "nic", dict(NICS)))


def test_the_driver_takes_its_card(nic: str) -> None:
    near, _ = cards(nic)
    device = Path("/sys/class/net", near)
    assert (device / "address").read_text().strip() == near_mac(NICS[nic])
    subprocess.run(["ip", "link", "set", near, "up"], check=True)  # igb says then how many it has
    assert len([*(device / "queues").glob("rx-*")]) == NICS[nic].queues


def test_frames_go_both_ways(nic: str) -> None:
    """In no order, for a card may have several TX queues. As they are used, all ends hear everything.

    (The emulated vmxnet3 goes on to filter by the MAC that it was made with.)
    """
    with Cards(nic) as lab:
        for ns, device in ((lab.host, lab.nic), (lab.wire, lab.wire_end)):
            ns.ip(f"link set {device} promisc on")
            lab.wait_link()
        for sender, out, dst, src, receiver, device in (
            (lab.wire, lab.wire_end, NIC_MAC, WIRE_MAC, lab.host, lab.nic),
            (lab.host, lab.nic, WIRE_MAC, NIC_MAC, lab.wire, lab.wire_end),
        ):
            sent = [test_frame(dst, src, number, size=60 + 20 * number) for number in range(COUNT)]
            with receiver.capture(device) as seen:
                sender.send(out, sent)
                assert sorted(seen.wait_for(COUNT)) == sorted(sent)
