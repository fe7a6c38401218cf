"""A daemon that has the NIC sort into virtual functions, for the tests of that.

The host is the machine's own network namespace, for there the functions' devices appear.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.client import Client
from tests.instance import Instance
from tests.lab import WIRE_MAC, Namespace, Vm, test_frame, wait_until
from tests.vm.inside.cards import Cards

COUNT = 40
SECONDS = 60


class OwnCards(Cards):
    """A lab whose host is the machine's own namespace."""

    def namespace(self, label: str) -> Namespace:
        if label != "host":
            return super().namespace(label)
        name = f"{self._id}-own"
        subprocess.run(["ip", "netns", "attach", name, "1"], check=True)
        self._undo.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        return Namespace(name)


@dataclass(frozen=True)
class Site:
    lab: OwnCards
    instance: Instance
    vms: Mapping[str, Vm]
    config: dict[str, Any]

    def queues(self) -> dict[str, dict[str, Any]]:
        """The VM queues by port, as ``offload queues --json`` has them."""
        with Client(self.instance.paths.socket) as client:
            shown = [queue.model_dump(mode="json") for queue in client.queues()]
        return {queue["ports"][0]: queue for queue in shown if queue["id"]}

    def set(self, **ports: Mapping[str, object]) -> None:
        for name, keys in ports.items():
            self.config["ports"][name] |= keys
        self.instance.file = self.instance.write(self.config)
        self.instance.cli("apply", str(self.instance.file))
        self.wait_steered()

    def wait_steered(self) -> None:
        """Every VM is heard, nothing is left to do, and the NIC sorts into what it shall."""
        self.lab.wait_link()
        self.instance.hear(*self.vms.values())

        def stands() -> bool:
            kinds = {"hardware": "standing", "software": "kind"}
            return all(queue[kinds[queue["kind"]]] for queue in self.queues().values())

        wait_until(stands, "the NIC sorts frames into its queues", SECONDS)

    def frames(self, name: str, tags: bytes = b"", first: int = 0) -> list[bytes]:
        return [test_frame(self.vms[name].mac, WIRE_MAC, first + seq, tags=tags) for seq in range(COUNT)]

    def received(self, device: str) -> int:
        """Frames that a device has received, by its driver."""
        return int(Path("/sys/class/net", device, "statistics/rx_packets").read_text())


def config_of(nic: str, vms: Mapping[str, Vm], **queues: object) -> dict[str, Any]:
    return {
        "version": 1,
        "metrics": None,
        "nics": {nic: {"queues": {"vf_xdp_mode": "generic", **queues}}},
        "switches": {"ext0": {"type": "external", "uplink": nic}},
        "ports": {name: {"switch": "ext0", "device": name, "mac": vm.mac} for name, vm in vms.items()},
    }


@contextmanager
def own_cards() -> Iterator[OwnCards]:
    """Two cards on a wire, and the functions' driver, which udev loads elsewhere."""
    subprocess.run(["modprobe", "igbvf"], check=True)
    with OwnCards("igb") as lab:
        yield lab


@contextmanager
def start(lab: OwnCards, config: dict[str, Any], vms: Mapping[str, Vm]) -> Iterator[Site]:
    with Instance(lab.host, config) as instance:
        instance.start()
        site = Site(lab, instance, vms, config)
        site.wait_steered()
        yield site
