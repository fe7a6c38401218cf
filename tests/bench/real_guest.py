"""A real guest: QEMU, which emulates its CPU, with a virtio-net device on a tap. TCP to it and from it.

The emulation is the bottleneck and not the network: that it works is what is shown, and at which rates.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tests.bench.contest import BITS, Comparison, Contestant, Round, Unavailable
from tests.bench.wire import BRIDGE
from tests.guest.guest import Guest, Image
from tests.guest.initramfs import initramfs
from tests.guest.test_guest import BULK, fetch, offer_data, web_server
from tests.instance import Instance, config_of, shared_cache
from tests.lab import Lab
from tests.vm.kernels import KERNELS, boot_files

MAC, ADDRESS, WIRE_ADDRESS = "02:15:5d:00:00:01", "192.0.2.11", "192.0.2.1"
DEVICE = "web1"
BOOT_LIMIT = 30.0
"""Seconds: a guest that takes longer to boot is left out."""

Connect = Callable[[ExitStack, Lab], None]


@dataclass(frozen=True)
class Way:
    """A load: a file is fetched ``to`` the guest or from it."""

    name: str
    to_guest: bool


class Boots:
    """Boots guests, until one was too slow: then no other is tried."""

    def __init__(self) -> None:
        self._refused: str | None = None

    def guest(self, held: ExitStack, lab: Lab) -> Guest:
        """Raises ``Unavailable`` where a guest cannot be had within ``BOOT_LIMIT``."""
        if self._refused is None:
            boot, began = image(), time.monotonic()
            guest = held.enter_context(Guest(lab.host, DEVICE, MAC, boot))
            taken = time.monotonic() - began
            if taken <= BOOT_LIMIT:
                return guest
            self._refused = f"a guest took {taken:.0f} s to boot, more than {BOOT_LIMIT:.0f}"
        raise Unavailable(self._refused)


@cache
def image() -> Image:
    """What a guest boots, fetched if need be."""
    if shutil.which("qemu-system-x86_64") is None:
        raise Unavailable("QEMU is not installed")
    try:
        boot = boot_files(KERNELS["6.1"])
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"no kernel for a guest: {error}") from error
    archive = Path(shared_cache()) / "guest-initramfs"
    archive.write_bytes(initramfs(boot.version, boot.modules))
    return Image(boot.kernel, archive)


def contestant(name: str, boots: Boots, connect: Connect) -> Contestant[Way]:
    """``connect`` joins the NIC and the guest's tap, which is there by then."""

    def set_up(held: ExitStack) -> Callable[[Way], Round]:
        lab = held.enter_context(Lab())
        lab.wire.ip(f"address add {WIRE_ADDRESS}/24 dev {lab.wire_end}")
        guest = boots.guest(held, lab)
        lab.host.ip(f"link set {DEVICE} up")
        connect(held, lab)
        guest.run(f"ip address add {ADDRESS}/24 dev eth0; ip link set eth0 up")
        guest.run(f"until ping -c 1 -W 1 {WIRE_ADDRESS}; do :; done")
        offer_data(guest)
        held.enter_context(web_server(lab.wire, WIRE_ADDRESS, bytes(BULK)))

        def run(load: Way) -> Round:
            began = time.monotonic()
            if load.to_guest:
                guest.run(f"wget -q -O /dev/null http://{WIRE_ADDRESS}/data")
            else:
                fetch(lab.wire, ADDRESS)
            return Round(time.monotonic() - began, octets=BULK)

        return run

    return Contestant(name, set_up)


def bridge(held: ExitStack, lab: Lab) -> None:
    lab.host.ip("link add br0 type bridge")
    for device in (lab.nic, DEVICE):
        lab.host.ip(f"link set {device} master br0")
    lab.host.ip("link set br0 up")


def ours(queue: str, held: ExitStack, lab: Lab) -> None:
    config = config_of(lab.nic, {DEVICE: MAC}, queue=queue)
    instance = held.enter_context(Instance(lab.host, config)).start()
    instance.wait_port(DEVICE, state="active")


def comparison(budget: float) -> Comparison[Way]:
    """The bridge against a queue."""
    boots = Boots()
    contestants = [
        contestant(BRIDGE, boots, bridge),
        contestant("ours", boots, partial(ours, "auto")),
        contestant("ours, queue: off", boots, partial(ours, "off")),
    ]
    loads = [Way("wire to guest", True), Way("guest to wire", False)]
    title = f"A real guest (emulated), TCP, {BULK >> 20} MiB at a time"
    return Comparison("guest", title, contestants, loads, (BITS,), {"bridge": BRIDGE}, budget)
