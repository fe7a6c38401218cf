"""From a VM, frame by frame: to a VM of the same switch, and to the wire.

The generator stands in for a VM that sends at full speed. Its frames become packets of the kernel at the
host's end of the VM's veth, where a program in tc meets them as it meets those of a guest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Literal

from tests.bench.contest import CPU_FRAME, FRAMES, Comparison, Contestant
from tests.bench.cpu import Meter
from tests.bench.frames import Frames, Journey, Track, XdpSink
from tests.bench.generator import Bare, destination
from tests.bench.wire import BRIDGE, VM_ADDRESS, VM_MAC, WIRE_ADDRESS, mirred
from tests.instance import Instance, config_of, shared_cache
from tests.lab import WIRE_MAC, Lab, Vm

Goal = Literal["VM", "wire"]
SENDER_MAC, SENDER_ADDRESS = destination(1), "192.0.2.12"
LOADS = (Frames("64 bytes", 64), Frames("1500 bytes", 1500))
TC, OURS = "tc redirect", "ours"
BASES = {"bridge": BRIDGE, "tc": TC}
JOURNEYS = {
    "VM": Journey(SENDER_MAC, SENDER_ADDRESS, VM_MAC, VM_ADDRESS),
    "wire": Journey(SENDER_MAC, SENDER_ADDRESS, WIRE_MAC, WIRE_ADDRESS),
}

Connect = Callable[..., None]
"""Joins the NIC and two VMs, on a stack that takes it all down: ``connect(held, lab, sink, sender)``."""


def contestant(name: str, goal: Goal, connect: Connect) -> Contestant[Frames]:
    """``web2`` sends, ``web1`` is the VM that gets it. ``connect`` joins them and the NIC."""

    def set_up(held: ExitStack) -> Track:
        meter = Meter()
        lab = held.enter_context(Lab())
        sink, sender = lab.vm("web1", VM_MAC), lab.vm("web2", SENDER_MAC)
        connect(held, lab, sink, sender)
        # Frames come to an XDP program or to GRO, or not at all.
        lab.host.run("ethtool", "-K", sender.device, "gro", "on")
        place = (sink.ns, "eth0") if goal == "VM" else (lab.wire, lab.wire_end)
        counts = XdpSink(held, *place)
        meter.watch()
        return Track(held, sender.ns, "eth0", JOURNEYS[goal], counts, meter)

    return Contestant(name, set_up)


def bridge(held: ExitStack, lab: Lab, *vms: Vm) -> None:
    """All three in a kernel bridge that was told where the MACs are."""
    lab.host.ip("link add br0 type bridge")
    lab.host.ip("link set br0 up")
    for device, mac in ((lab.nic, WIRE_MAC), *((vm.device, vm.mac) for vm in vms)):
        lab.host.ip(f"link set {device} master br0")
        lab.host.run("bridge", "fdb", "replace", mac, "dev", device, "master", "static")


def tc_redirect(goal: Goal, held: ExitStack, lab: Lab, sink: Vm, sender: Vm) -> None:
    """tc redirects what the VM sends and looks at nothing."""
    mirred(lab, sender.device, sink.device if goal == "VM" else lab.nic)


def bare_redirect(goal: Goal, held: ExitStack, lab: Lab, sink: Vm, sender: Vm) -> None:
    """XDP redirects what the VM sends. What a guest leaves to be done to its packets, XDP does not see."""
    bare = held.enter_context(Bare(shared_cache()))
    bare.set_device("devices", 0, lab.host, sink.device if goal == "VM" else lab.nic)
    bare.attach("redirect", lab.host, sender.device)


def ours(queue: str, held: ExitStack, lab: Lab, *vms: Vm) -> None:
    """A switch of ours. ``queue`` off: without the fast path."""
    config = config_of(lab.nic, {vm.device: vm.mac for vm in vms}, queue=queue)
    held.enter_context(Instance(lab.host, config)).start(speaking=vms)


def comparison(goal: Goal, budget: float) -> Comparison[Frames]:
    """Frames from a VM to a VM or to the wire."""
    contestants = [
        contestant(BRIDGE, goal, bridge),
        contestant(TC, goal, partial(tc_redirect, goal)),
        contestant("bare redirect at the VM's end, no use for guests", goal, partial(bare_redirect, goal)),
        contestant(OURS, goal, partial(ours, "auto")),
        contestant("ours, queue: off", goal, partial(ours, "off")),
    ]
    title = f"VM to {goal}, sink in an XDP program"
    return Comparison(f"vm-{goal.lower()}", title, contestants, LOADS, (FRAMES, CPU_FRAME), BASES, budget)
