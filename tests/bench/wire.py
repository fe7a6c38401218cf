"""From the wire to a VM, frame by frame: ours against the ways that Linux has."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from offload.kernel.dataplane import MAX_PORTS
from offload.kernel.netns import call_in
from tests.bench import ovs
from tests.bench.contest import CPU_FRAME, FRAMES, Comparison, Contestant, Unavailable
from tests.bench.cpu import Meter
from tests.bench.frames import (
    OTHER_CPU,
    ConsumerSink,
    Frames,
    Journey,
    StackSink,
    Track,
    XdpSink,
)
from tests.bench.generator import Bare, destination, offload_on
from tests.instance import Instance, config_of, shared_cache
from tests.lab import WIRE_MAC, Lab, Vm, test_frame

VM_MAC = destination(0)
VM_ADDRESS, WIRE_ADDRESS = "192.0.2.11", "192.0.2.1"
TO_VM = Journey(WIRE_MAC, WIRE_ADDRESS, VM_MAC, VM_ADDRESS)
VID = 10
BRIDGE, MACVLAN, BARE = "kernel bridge", "macvlan", "bare redirect"
OURS, OURS_QUEUE = "ours, cpu: nic", f"ours, queue on CPU {OTHER_CPU}"
BASES = {"bridge": BRIDGE, "bare": BARE}
SIZES = tuple(Frames(f"{size} bytes", size) for size in (64, 512, 1500))
REFUSED = Frames("64 bytes, refused by IP", refused=True)
FILTERS = (1, 100, 4096, 65_536)
SinkKind = Literal["XDP", "stack"]


@dataclass(frozen=True)
class Site:
    """A laboratory with one VM, to be connected."""

    held: ExitStack
    lab: Lab
    vm: Vm
    sink: SinkKind
    spinning: list[int] = field(default_factory=list)
    """Processes that forward frames and never sleep."""

    def gro_at_nic(self) -> None:
        """Without it a veth that has no XDP program takes no frames from the generator."""
        self.lab.host.run("ethtool", "-K", self.lab.nic, "gro", "on")

    def gro_at_vm(self) -> None:
        """The same for the VM's end, and frames that an XDP program redirects."""
        self.vm.ns.run("ethtool", "-K", "eth0", "gro", "on")


Connect = Callable[[Site], None]


def contestant(name: str, sink: SinkKind, connect: Connect) -> Contestant[Frames]:
    """A way from the NIC to the VM's device, made by ``connect``."""

    def set_up(held: ExitStack) -> Track:
        meter = Meter()
        lab = held.enter_context(Lab())
        vm = lab.vm("web1", VM_MAC, f"{VM_ADDRESS}/24")
        site = Site(held, lab, vm, sink)
        connect(site)
        counts = XdpSink(held, vm.ns, "eth0") if sink == "XDP" else StackSink(held, vm.ns, VM_ADDRESS)
        meter.watch(*site.spinning)
        return Track(held, lab.wire, lab.wire_end, TO_VM, counts, meter, site.spinning)

    return Contestant(name, set_up)


def bridge(entries: int, site: Site) -> None:
    """NIC and port in a kernel bridge that was told where the MACs are."""
    host, nic, device = site.lab.host, site.lab.nic, site.vm.device
    host.ip("link add br0 type bridge")
    host.ip(f"link set {nic} master br0")
    host.ip(f"link set {device} master br0")
    host.ip("link set br0 up")
    site.gro_at_nic()
    with tempfile.NamedTemporaryFile("w", suffix=".batch") as batch:
        for number in range(entries):
            batch.write(f"fdb replace {destination(number)} dev {device} master static\n")
        batch.flush()
        host.run("bridge", "-batch", batch.name)


def macvlan(site: Site) -> None:
    """The VM's device is a macvlan on the NIC."""
    if site.sink == "XDP":
        raise Unavailable("a macvlan has no native XDP")
    lab, vm = site.lab, site.vm
    lab.unplug(vm)
    lab.host.ip(f"link add link {lab.nic} name {vm.device} address {vm.mac} type macvlan mode bridge")
    lab.host.ip(f"link set {vm.device} netns {vm.ns.name} name eth0")
    vm.ns.ip(f"address add {VM_ADDRESS}/24 dev eth0")
    vm.ns.ip("link set eth0 up")
    site.gro_at_nic()


def open_vswitch(site: Site) -> None:
    """NIC and port in Open vSwitch, with a flow for the VM's MAC."""
    switch = ovs.Switch(site.held, site.lab.host, site.lab.nic, site.vm.device)
    switch.forward(site.vm.mac, 2)
    site.spinning.append(switch.pid)


def tc_redirect(site: Site) -> None:
    """tc on the NIC redirects every frame and looks at nothing."""
    mirred(site.lab, site.lab.nic, site.vm.device)
    site.gro_at_nic()


def mirred(lab: Lab, source: str, target: str) -> None:
    """Everything that ``source`` gets leaves by ``target``."""
    lab.host.run("tc", "qdisc", "add", "dev", source, "clsact")
    everything = f"filter add dev {source} ingress protocol all u32 match u32 0 0"
    lab.host.run("tc", *everything.split(), *f"action mirred egress redirect dev {target}".split())


def bare_redirect(site: Site) -> None:
    """XDP on the NIC redirects every frame and looks at nothing: no program there can be faster."""
    bare = site.held.enter_context(Bare(shared_cache()))
    bare.set_device("devices", 0, site.lab.host, site.vm.device)
    bare.attach("redirect", site.lab.host, site.lab.nic)
    site.gro_at_vm()


def ours(filters: int, site: Site, cpu: int | None = None, vid: int = 0, trunk: bool = False) -> None:
    """Our program on the NIC, a port for each filter as far as there can be that many."""
    ports = min(filters, MAX_PORTS)
    offload_on(
        site.held, shared_cache(), site.lab, site.vm.device, filters, ports, cpu=cpu, vid=vid, trunk=trunk
    )
    site.gro_at_vm()


def af_xdp(sink: SinkKind) -> Contestant[Frames]:
    """A consumer on the software channel of an AF_XDP port."""

    def set_up(held: ExitStack) -> Track:
        if sink == "stack":
            raise Unavailable("an AF_XDP port ends in a process, not in a stack")
        meter = Meter()
        lab = held.enter_context(Lab())
        config = config_of(lab.nic, {})
        config["ports"]["web1"] = {"switch": "ext0", "mac": VM_MAC, "af_xdp": {"mode": "software"}}
        instance = held.enter_context(Instance(lab.host, config)).start()
        [shown] = instance.port("web1")["af_xdp"]["channels"]
        netns, device = instance.paths.namespace("web1"), shown["ifname"]
        consumer = ConsumerSink(held, netns, device, shown["map_path"])
        call_in(str(netns), partial(_announce, device))
        instance.wait_heard(VM_MAC)
        meter.watch(consumer.pid)
        return Track(held, lab.wire, lab.wire_end, TO_VM, consumer, meter)

    return Contestant("ours, AF_XDP software channel", set_up)


def _announce(device: str) -> None:
    """Be heard as the VM."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind((device, 0))
        sender.send(test_frame(VM_MAC, VM_MAC))


def sizes(sink: SinkKind, budget: float, whole: bool = True) -> Comparison[Frames]:
    """Everybody, with one destination. ``whole``: sizes between the least and the most as well."""
    contestants = [
        contestant(BRIDGE, sink, partial(bridge, 1)),
        contestant(MACVLAN, sink, macvlan),
        contestant(ovs.NAME, sink, open_vswitch),
        contestant("tc redirect", sink, tc_redirect),
        contestant(BARE, sink, bare_redirect),
        contestant(OURS, sink, partial(ours, 1)),
        contestant(OURS_QUEUE, sink, partial(ours, 1, cpu=OTHER_CPU)),
        af_xdp(sink),
    ]
    where = "an XDP program" if sink == "XDP" else "a stack with a UDP socket"
    chosen = SIZES if whole else (SIZES[0], SIZES[-1])
    loads = chosen if sink == "XDP" else (REFUSED, *chosen)
    bases = BASES if sink == "XDP" else {"bridge": BRIDGE, "macvlan": MACVLAN, "bare": BARE}
    title = f"Wire to VM, sink in {where}"
    return _comparison(f"wire-{sink.lower()}", title, contestants, loads, budget, bases)


def filters(count: int, budget: float) -> Comparison[Frames]:
    """So many destinations, each with a filter or an entry of its own."""
    contestants = [
        contestant(BRIDGE, "XDP", partial(bridge, count)),
        contestant(BARE, "XDP", bare_redirect),
        contestant(OURS, "XDP", partial(ours, count)),
        contestant(OURS_QUEUE, "XDP", partial(ours, count, cpu=OTHER_CPU)),
    ]
    loads = [Frames("uniform", destinations=count), Frames("skewed", destinations=count, skewed=True)]
    title = f"Wire to VM, 64 bytes, {count:,} filter{'s' * (count > 1)}, sink in XDP"
    return _comparison(f"wire-filters-{count}", title, contestants, loads if count > 1 else loads[:1], budget)


def tags(budget: float) -> Comparison[Frames]:
    """Frames of a VLAN: taken off, left on, and looked at by nobody."""
    contestants = [
        contestant(BRIDGE, "XDP", partial(bridge, 1)),
        contestant(BARE, "XDP", bare_redirect),
        contestant("ours, access port: takes the tag off", "XDP", partial(ours, 1, vid=VID)),
        contestant("ours, trunk: leaves the tag", "XDP", partial(ours, 1, vid=VID, trunk=True)),
    ]
    loads = [Frames("tagged", vid=VID)]
    title = f"Wire to VM, 64 bytes and a tag of VID {VID} (a bridge here looks at no tag and leaves it), XDP"
    return _comparison("wire-tags", title, contestants, loads, budget)


def _comparison(
    name: str,
    title: str,
    contestants: Sequence[Contestant[Frames]],
    loads: Sequence[Frames],
    budget: float,
    bases: Mapping[str, str] = BASES,
) -> Comparison[Frames]:
    return Comparison(name, title, contestants, loads, (FRAMES, CPU_FRAME), bases, budget)
