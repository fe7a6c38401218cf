"""A laboratory whose NIC and wire are two emulated cards with their real driver."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.lab import NIC_MAC, WIRE_MAC, Lab, Namespace, wait_until

LINK_SECONDS = 20.0
"""The longest that a card takes to find its link again; under a second with igb."""


class Cards(Lab):
    """A lab that has a pair of cards of ``driver`` in place of the veth pair, with names and MACs as usual.

    With the namespaces gone the cards are back in the machine's own, with MACs of their own.
    """

    def __init__(self, driver: str) -> None:
        self._driver = driver
        super().__init__()

    def add_nic(
        self, nic: str, wire_end: str, number: int = 0, queues: int = 4, host: Namespace | None = None
    ) -> None:
        wait_until(lambda: len(cards(self._driver)) == 2, f"there are two cards of {self._driver}")
        near, far = cards(self._driver)
        for card, ns, name, mac in (
            (far, self.wire, wire_end, WIRE_MAC),
            (near, self.host, nic, NIC_MAC),
        ):
            own_mac = Path("/sys/class/net", card, "address").read_text().strip()
            subprocess.run(["ip", "link", "set", card, "netns", ns.name], check=True)
            ns.ip(f"link set {card} down name {name} address {mac}")
            self._undo.callback(ns.ip, f"link set {name} address {own_mac}")
            ns.ip(f"link set {name} up")
        self.wait_link()

    def wait_link(self) -> None:
        """Wait till both cards have their link: attaching XDP, for one, resets a card."""
        ends = ((self.host, self.nic), (self.wire, self.wire_end))
        wait_until(
            lambda: all("LOWER_UP" in ns.ip(f"link show {name}") for ns, name in ends),
            "both cards have a link",
            LINK_SECONDS,
        )

    def receive_on(self, queue: int) -> None:
        """Let RSS put what it spreads, IP that is, into this one of two queues. The rest stays with 0."""
        weights = [str(int(number == queue)) for number in range(2)]
        self.host.run("ethtool", "-X", self.nic, "weight", *weights)

    def counter(self, name: str) -> int:
        """A counter of the NIC's driver, as ``ethtool -S`` names it."""
        lines = self.host.run("ethtool", "-S", self.nic).stdout.splitlines()
        [value] = [line.split(":")[1] for line in lines if line.strip().startswith(f"{name}:")]
        return int(value)


def cards(driver: str) -> list[str]:
    """The devices of a driver in this namespace, by their place on the bus: the near card comes first."""
    places = {}
    for device in Path("/sys/class/net").glob("*/device"):
        if os.path.basename(os.path.realpath(device / "driver")) == driver:
            places[os.path.realpath(device)] = device.parent.name
    return [places[place] for place in sorted(places)]
