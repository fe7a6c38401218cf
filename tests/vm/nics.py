"""The emulated network cards. A new one is one line of ``NICS``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nic:
    """``name`` is the Linux driver's; ``device`` is QEMU's device with its properties."""

    name: str
    device: str


NICS = {
    nic.name: nic
    for nic in (
        Nic("virtio_net", "virtio-net-pci,mq=on,vectors=10"),
        Nic("e1000e", "e1000e"),
        Nic("vmxnet3", "vmxnet3"),
    )
}


def near_mac(nic: Nic) -> str:
    """The MAC of the card that is to be tested. That of the other end of its wire ends in 01."""
    return f"02:aa:00:01:{list(NICS).index(nic.name):02x}:02"


def wired(nic: Nic) -> list[str]:
    """QEMU's options for two such cards, joined by a wire."""
    wire = f"wire-{nic.name}"
    near = near_mac(nic)
    return [
        option
        for end, mac in (("near", near), ("far", f"{near[:-2]}01"))
        for option in (
            *("-netdev", f"hubport,hubid={list(NICS).index(nic.name)},id={wire}-{end}"),
            *("-device", f"{nic.device},netdev={wire}-{end},mac={mac}"),
        )
    ]
