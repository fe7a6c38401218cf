"""The emulated network cards. A new one is one line of ``NICS``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Nic:
    """``name`` is the Linux driver's; ``device`` is QEMU's device with its properties.

    ``queues`` is how many RX queues the driver makes of it in a machine with two CPUs. A card that has
    as many queue pairs as its wire (virtio's) gets a wire of taps with this many ``pairs``.
    """

    name: str
    device: str
    queues: int
    pairs: int = 1


NICS = {
    nic.name: nic
    for nic in (
        Nic("igb", "igb", 2),
        Nic("virtio_net", "virtio-net-pci,mq=on,vectors=10", 2, pairs=4),  # two are for what XDP sends
        Nic("e1000e", "e1000e", 1),
        Nic("vmxnet3", "vmxnet3", 2),
    )
}


def near_mac(nic: Nic) -> str:
    """The MAC of the card that is to be tested. That of the other end of its wire ends in 01."""
    return f"02:aa:00:01:{list(NICS).index(nic.name):02x}:02"


def wired(nic: Nic, taps: Sequence[Sequence[int]] = ()) -> list[str]:
    """QEMU's options for two such cards, joined by a wire, each on a PCI Express port of its own.

    (SR-IOV wants such a port.) ``taps`` are the ``fds`` of a wire of taps; else the wire is a hub of QEMU's.
    """
    wire = list(NICS).index(nic.name)
    ends = [f"tap,fds={':'.join(map(str, queues))}" for queues in taps] or 2 * [f"hubport,hubid={wire}"]
    near = near_mac(nic)
    return [
        option
        for number, (mac, end) in enumerate(zip((near, f"{near[:-2]}01"), ends, strict=True), 2 * wire)
        for option in (
            *("-netdev", f"{end},id=card{number}"),
            *("-device", f"pcie-root-port,id=slot{number},chassis={number}"),
            *("-device", f"{nic.device},bus=slot{number},netdev=card{number},mac={mac}"),
        )
    ]
