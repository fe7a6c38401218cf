"""What may happen to any NIC and to the ports of its switch: events for ``tests/chaos.py``."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from offload.kernel.bpf import Link
from tests.chaos import MOVABLE, Event, Site

# Devices


@contextmanager
def port_s_device_down(site: Site, rng: Random) -> Iterator[str]:
    name, guest = site.guest(rng)
    site.lab.host.ip(f"link set {guest.vm.device} down")
    yield name
    site.lab.host.ip(f"link set {guest.vm.device} up")


@contextmanager
def vm_s_end_down(site: Site, rng: Random) -> Iterator[str]:
    name, guest = site.guest(rng)
    guest.vm.ns.ip("link set eth0 down")
    yield name
    guest.vm.ns.ip("link set eth0 up")


@contextmanager
def port_s_device_made_anew(site: Site, rng: Random) -> Iterator[str]:
    """Its VM is silent at first, and must speak before the product believes that it is there."""
    name, guest = site.guest(rng)
    site.lab.unplug(guest.vm)
    yield name
    site.lab.plug(guest.vm)
    site.settle()
    guest.vm.announce()


@contextmanager
def nic_down(site: Site, rng: Random) -> Iterator[str]:
    site.lab.host.ip(f"link set {site.lab.nic} down")
    yield ""
    site.lab.host.ip(f"link set {site.lab.nic} up")


@contextmanager
def wire_down(site: Site, rng: Random) -> Iterator[str]:
    """The other end of the wire, as when somebody pulls the plug."""
    site.lab.wire.ip(f"link set {site.lab.wire_end} down")
    yield ""
    site.lab.wire.ip(f"link set {site.lab.wire_end} up")


@contextmanager
def link_flaps(site: Site, rng: Random) -> Iterator[str]:
    """Faster than anybody looks."""
    ends = rng.choices(((site.lab.host, site.lab.nic), (site.lab.wire, site.lab.wire_end)), k=3)
    for ns, device in ends:
        ns.ip(f"link set {device} down")
        ns.ip(f"link set {device} up")
    yield ", ".join(device for _, device in ends)


# Settings


@contextmanager
def mtu_of_the_nic(site: Site, rng: Random) -> Iterator[str]:
    """Some MTUs a driver does not take while it has XDP."""
    mtu = rng.choice((1280, 1400, 3000, 9000))
    done = site.lab.host.run("ip", "link", "set", site.lab.nic, "mtu", str(mtu), check=False)
    yield f"{mtu}{' (refused)' if done.returncode else ''}"
    site.lab.host.ip(f"link set {site.lab.nic} mtu {site.lab.mtu}")


@contextmanager
def mtu_of_a_port(site: Site, rng: Random) -> Iterator[str]:
    name, guest = site.guest(rng)
    mtu = rng.choice((1280, 9000))
    ends = ((site.lab.host, guest.vm.device), (guest.vm.ns, "eth0"))
    for ns, device in ends:
        ns.ip(f"link set {device} mtu {mtu}")
    yield f"{name} {mtu}"
    for ns, device in ends:
        ns.ip(f"link set {device} mtu {site.lab.mtu}")


@contextmanager
def promiscuity_off(site: Site, rng: Random) -> Iterator[str]:
    site.lab.host.ip(f"link set {site.lab.nic} promisc off")
    yield ""


@contextmanager
def gro_of_the_nic(site: Site, rng: Random) -> Iterator[str]:
    site.lab.host.run("ethtool", "-K", site.lab.nic, "gro", "off")
    yield ""
    site.lab.host.run("ethtool", "-K", site.lab.nic, "gro", "on")


@contextmanager
def gro_of_a_vm_s_end(site: Site, rng: Random) -> Iterator[str]:
    """A veth takes what XDP hands to it only while its other end has GRO."""
    name, guest = site.guest(rng)
    guest.vm.ns.run("ethtool", "-K", "eth0", "gro", "off")
    yield name


# The bridge


@contextmanager
def flags_of_a_bridge_port(site: Site, rng: Random) -> Iterator[str]:
    name, guest = site.guest(rng)
    site.lab.host.run("bridge", "link", "set", "dev", guest.vm.device, "flood", "on", "learning", "on")
    yield name


@contextmanager
def static_entries_deleted(site: Site, rng: Random) -> Iterator[str]:
    name, guest = site.guest(rng)
    shown = site.lab.host.run("bridge", "-json", "fdb", "show", "dev", guest.vm.device).stdout
    for entry in json.loads(shown):
        if entry["mac"] == guest.vm.mac and entry.get("master"):
            vlan = ["vlan", str(entry["vlan"])] if "vlan" in entry else []
            delete = ("bridge", "fdb", "del", entry["mac"], "dev", guest.vm.device, "master", *vlan)
            site.lab.host.run(*delete)
    yield name


@contextmanager
def out_of_the_bridge(site: Site, rng: Random) -> Iterator[str]:
    device = rng.choice([site.lab.nic, *(guest.vm.device for guest in site.guests.values())])
    site.lab.host.ip(f"link set {device} nomaster")
    yield device


@contextmanager
def bridge_deleted(site: Site, rng: Random) -> Iterator[str]:
    site.lab.host.ip("link delete ext0")
    yield ""


# Programs


@contextmanager
def xdp_forced_off(site: Site, rng: Random) -> Iterator[str]:
    pin = site.instance.paths.objects / "nics" / str(site.lab.host.ifindex(site.lab.nic)) / "uplink"
    with Link.pinned(pin) as link:
        link.detach()
    yield ""


@contextmanager
def tc_forced_off(site: Site, rng: Random) -> Iterator[str]:
    """From a port or from the NIC: the tcx links, or where the kernel has none, the qdisc of the filters."""
    device = rng.choice([site.lab.nic, *(guest.vm.device for guest in site.guests.values())])
    pins = site.instance.paths.objects / "members" / str(site.lab.host.ifindex(device))
    for pin in pins.iterdir() if pins.is_dir() else ():
        with Link.pinned(pin) as link:
            link.detach()
    if not pins.is_dir():
        site.lab.host.run("tc", "qdisc", "delete", "dev", device, "clsact")
    yield device


# The operator and the daemon


@contextmanager
def queue_moves(site: Site, rng: Random) -> Iterator[str]:
    cpus: list[int | str] = rng.choices((0, 1, "nic", "auto"), k=3)
    with site.client() as client:
        for cpu in cpus:
            client.port_set(MOVABLE, {"cpu": cpu})
    yield str(cpus)


@contextmanager
def queue_given_up(site: Site, rng: Random) -> Iterator[str]:
    with site.client() as client:
        client.port_set(MOVABLE, {"queue": "off"})
        yield ""
        client.port_set(MOVABLE, {"queue": "auto", "weight": rng.randint(1, 100)})


@contextmanager
def port_removed_and_added(site: Site, rng: Random) -> Iterator[str]:
    """Its VM is silent at first, and must speak before the product believes that it is there."""
    with site.client() as client:
        client.port_remove(MOVABLE)
    yield ""
    site.add_movable()
    site.guests[MOVABLE].vm.announce()


@contextmanager
def daemon_killed(site: Site, rng: Random) -> Iterator[str]:
    site.instance.stop(signal.SIGKILL)
    site.traffic.run_on()
    site.instance.start()
    yield ""


OF_THE_NIC = (
    Event(nic_down),
    Event(wire_down),
    Event(link_flaps),
    Event(mtu_of_the_nic),
    Event(promiscuity_off),
    Event(xdp_forced_off, untold=True),
    Event(queue_moves, lossless=True),
    Event(daemon_killed, lossless=True),
)
OF_THE_SWITCH = (
    Event(port_s_device_down),
    Event(vm_s_end_down),
    Event(port_s_device_made_anew),
    Event(mtu_of_a_port),
    Event(gro_of_the_nic),
    Event(gro_of_a_vm_s_end, untold=True),
    Event(flags_of_a_bridge_port),
    Event(static_entries_deleted, untold=True),
    Event(out_of_the_bridge),
    Event(bridge_deleted),
    Event(tc_forced_off, untold=True, opens=True),
    Event(queue_given_up, lossless=True),
    Event(port_removed_and_added),
)
