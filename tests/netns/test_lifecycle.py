"""A daemon's life: start, adopt, die, detach; and what it leaves behind, which is nothing. Needs root.

The lab has things of other people in it: a bridge, an XDP program, a tc filter on one of our ports'
devices. They are part of every snapshot that is compared here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.kernel import rcu
from offload.paths import Paths
from tests.instance import BPFFS, Instance, config_of, vms_of
from tests.lab import WIRE_MAC, Lab, Namespace, Vm, test_frame, wait_until, xdp_pass
from tests.snapshot import Snapshot, assert_unchanged, difference, pins, settled, snapshot, snapshot_of

pytestmark = pytest.mark.slow

MEMORY_LIMIT = 80_000_000
"""Bytes that a daemon may have resident."""
MANY = 100


@dataclass
class Site:
    """A lab with IPv6, two NICs with a VM each, and things of other people."""

    lab: Lab
    vms: dict[str, Vm]

    def snapshot(self) -> Snapshot:
        return snapshot(self.lab.host, self.lab.wire, *(vm.ns for vm in self.vms.values()))

    def config(self, nic: str = "eth1", switch: str = "ext0", vm: str = "web1") -> dict[str, Any]:
        config = config_of(nic, {vm: self.vms[vm].mac})
        config["switches"] = {switch: config["switches"].pop("ext0")}
        config["ports"][vm]["switch"] = switch
        return config

    def assert_forwards(self, device: str = "wire0", vm: str = "web1") -> None:
        """A frame from the wire gets to the VM, on whichever path."""
        with self.vms[vm].capture() as seen:
            self.lab.wire.send(device, [test_frame(self.vms[vm].mac, WIRE_MAC, seq=7)])
            seen.wait_for(1, wanted=lambda frame: b"offl" in frame)


@pytest.fixture(scope="module")
def site(privilege: None) -> Iterator[Site]:
    """See ``Site``. Scope: the module."""
    with Lab(ipv6=True) as lab:
        vms = vms_of(lab, 2)
        host = lab.host
        # Unlike those of eth1, this wire's end still hides tags from the NIC's XDP program.
        host.ip(f"link add eth2 type veth peer name wire2 netns {lab.wire.name}")
        lab.wire.ip("link set wire2 up")
        host.ip("link set eth2 up")
        for command in ("add theirs0 type bridge", "add theirs1 type veth peer name theirs2"):
            host.ip(f"link {command}")
        for command in ("theirs1 master theirs0", "theirs0 up", "theirs1 up", "theirs2 up"):
            host.ip(f"link set {command}")
        xdp_pass(host, "theirs2")
        for device in ("theirs1", "web1"):
            host.run("tc", "qdisc", "add", "dev", device, "clsact")
            for where in ("ingress", "egress"):
                anything = ("u32", "match", "u32", "0", "0", "flowid", "1:1")
                host.run("tc", "filter", "add", "dev", device, where, "protocol", "0x88b6", *anything)
        found = Site(lab, vms)
        namespaces = (host, lab.wire, *(vm.ns for vm in vms.values()))
        settled(*namespaces)
        wait_until(
            lambda: not any("tentative" in ns.ip("address") for ns in namespaces), "addresses are known"
        )
        yield found


@pytest.fixture
def start(site: Site) -> Iterator[Callable[..., Instance]]:
    """Start a daemon and hear its VMs: ``start(config)``; without one, that of eth1. Scope: one test."""
    with ExitStack() as stack:

        def started(config: dict[str, Any] | None = None) -> Instance:
            config = config or site.config()
            instance = stack.enter_context(Instance(site.lab.host, config))
            return instance.start(speaking=[vm for name, vm in site.vms.items() if name in config["ports"]])

        yield started


def program(instance: Instance) -> int:
    (nic,) = instance.json("nics")
    found: int = nic["program"]["id"]
    return found


def prog_ids(snapshot: Snapshot) -> set[str]:
    return {value for key, value in snapshot.items() if ".xdp" in key or "tcx" in key}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_restart_adopts(site: Site, start: Callable[..., Instance], end: signal.Signals) -> None:
    """From before the end to after the new start: the same programs, links, maps, settings."""
    instance = start()
    before = site.snapshot() | snapshot_of(instance)
    held = before.pop("held by the daemon")
    code = instance.stop(end)
    assert code == (0 if end is signal.SIGTERM else -signal.SIGKILL)
    assert_unchanged(before, lambda: site.snapshot() | snapshot_of(instance))
    assert instance.cli("plan", str(instance.file)).stdout == "nothing to change\n"
    instance.log.unlink()
    instance.start()
    told = [line.split(" ", 3)[3] for line in instance.log.read_text().splitlines()]
    assert told == [f"ready: {instance.paths.socket}"]
    after = site.snapshot() | snapshot_of(instance)
    ids = set(held.split())
    assert set(after.pop("held by the daemon").split()) <= ids
    assert difference(before, after) == []
    assert instance.cli("plan").stdout == "nothing to change\n"
    assert instance.cli("apply", str(instance.file)).stdout == "nothing to change\n"
    site.assert_forwards()


@pytest.mark.parametrize(("nic", "vm"), [("eth1", "web1"), ("eth2", "web2")], ids=["eth1", "eth2"])
def test_detach_all_with_the_daemon_dead(
    site: Site, start: Callable[..., Instance], nic: str, vm: str
) -> None:
    before = site.snapshot()
    instance = start(site.config(nic, vm=vm))
    assert difference(before, site.snapshot())
    instance.stop(signal.SIGKILL)
    assert not instance.cli("detach", "--all").stderr.count("Traceback")
    assert_unchanged(before, site.snapshot)
    assert pins(instance) == []
    assert instance.paths.journal.read_text() == ""
    again = instance.cli("detach", "--all")
    assert again.stdout == "nothing to change\n"
    assert_unchanged(before, site.snapshot)


def test_detach_all_ends_the_daemon(site: Site, start: Callable[..., Instance]) -> None:
    before = site.snapshot()
    instance = start()
    instance.cli("detach", "--all")
    assert instance.process is not None
    assert instance.process.wait(10) == 0
    assert_unchanged(before, site.snapshot)
    assert pins(instance) == []
    assert instance.paths.journal.read_text() == ""


def test_detach_offline_leaves_the_bridge_forwarding(site: Site, start: Callable[..., Instance]) -> None:
    before = site.snapshot()
    instance = start()
    instance.stop(signal.SIGKILL)
    instance.cli("detach")
    assert not [path for path in pins(instance) if "nics" in path.parts]
    assert "xdp" not in site.lab.host.ip("link show eth1")
    assert "master ext0" in site.lab.host.ip("link show eth1")
    site.assert_forwards()
    assert instance.cli("detach").stdout == "nothing to change\n"
    instance.start()
    assert instance.port("web1")["path"] == "queue"
    site.assert_forwards()
    instance.cli("detach", "--all")
    assert_unchanged(before, site.snapshot)


def test_detach_through_the_daemon_and_apply(site: Site, start: Callable[..., Instance]) -> None:
    instance = start()
    instance.cli("detach")
    port = instance.port("web1")
    assert (port["path"], port["reason"]) == (
        "bridge",
        "the fast path is detached: `offload apply FILE` puts it back",
    )
    assert "xdp" not in site.lab.host.ip("link show eth1")
    site.assert_forwards()
    assert instance.cli("detach").stdout == "nothing to change\n"
    instance.cli("apply", str(instance.file))
    assert instance.port("web1")["path"] == "queue"
    site.assert_forwards()


def test_two_instances_side_by_side(site: Site, start: Callable[..., Instance]) -> None:
    empty = site.snapshot()
    first = start()
    alone = site.snapshot() | snapshot_of(first)
    second = start(site.config("eth2", "ext2", "web2"))
    for instance, device, vm in ((first, "wire0", "web1"), (second, "wire2", "web2")):
        assert instance.port(vm)["path"] == "queue"
        site.assert_forwards(device, vm)
    second.stop()
    second.cli("detach", "--all")
    assert_unchanged(alone, lambda: site.snapshot() | snapshot_of(first))
    site.assert_forwards()
    first.cli("detach", "--all")
    assert_unchanged(empty, site.snapshot)


def test_second_daemon_is_refused(site: Site, start: Callable[..., Instance]) -> None:
    instance = start()
    before = site.snapshot() | snapshot_of(instance)
    second = instance.cli("run", "--config", str(instance.file), check=False)
    assert second.returncode == 1
    assert second.stderr == (
        f"another offload is using {instance.paths.run_dir}: stop it, or name another --run-dir\n"
    )
    assert_unchanged(before, lambda: site.snapshot() | snapshot_of(instance))
    assert instance.port("web1")["path"] == "queue"


def test_second_daemon_on_the_same_pins_is_refused(site: Site, start: Callable[..., Instance]) -> None:
    """Another run directory does not make it another instance."""
    instance = start()
    before = site.snapshot() | snapshot_of(instance)
    with Instance(site.lab.host, site.config()) as second:
        second.paths = Paths(second.paths.run_dir, second.paths.state_dir, instance.paths.pin_dir)
        for command in (("run", "--config", str(second.file)), ("detach", "--all")):
            refused = second.cli(*command, check=False)
            assert refused.returncode == 1
            assert str(instance.paths.pin_dir) in refused.stderr
            assert_unchanged(before, lambda: site.snapshot() | snapshot_of(instance))
        second.paths = Paths(second.paths.run_dir, second.paths.state_dir, BPFFS / second.directory.name)


def test_socket_of_a_dead_daemon_is_told(start: Callable[..., Instance]) -> None:
    instance = start()
    instance.stop(signal.SIGKILL)
    assert instance.paths.socket.exists()
    refused = instance.cli("ports", check=False)
    assert refused.returncode == 1
    assert "offload run" in refused.stderr or "systemctl start offload" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_file_in_the_sockets_place_is_left_alone(site: Site) -> None:
    before = site.snapshot()
    with Instance(site.lab.host, site.config()) as instance:
        instance.paths.run_dir.mkdir()
        instance.paths.socket.write_text("mine")
        refused = instance.cli("run", "--config", str(instance.file), check=False)
        assert refused.returncode == 1
        assert f"{instance.paths.socket}: is not a socket" in refused.stderr
        assert instance.paths.socket.read_text() == "mine"
        assert_unchanged(before, site.snapshot)
        assert pins(instance) == []


@pytest.mark.parametrize("command", [("detach",), ("detach", "--all"), ("run",)], ids=" ".join)
def test_another_network_namespace(
    site: Site, start: Callable[..., Instance], command: tuple[str, ...]
) -> None:
    """The same directories seen from the wire's namespace, where ifindexes mean other devices."""
    instance = start()
    instance.stop(signal.SIGKILL)
    before = site.snapshot() | snapshot_of(instance)
    instance.host = site.lab.wire
    arguments = ("--config", str(instance.file)) if command == ("run",) else ()
    refused = instance.cli(*command, *arguments, check=False)
    instance.host = site.lab.host
    assert_unchanged(before, lambda: site.snapshot() | snapshot_of(instance))
    assert refused.returncode == 1
    assert "network namespace" in refused.stderr
    assert "nsenter" in refused.stderr
    assert_unchanged(before, lambda: site.snapshot() | snapshot_of(instance))
    site.assert_forwards()


def test_detach_after_a_device_has_gone(site: Site, start: Callable[..., Instance]) -> None:
    """What was to be given back to it is forgotten, not kept for whoever gets its number."""
    lab = site.lab
    before = site.snapshot()
    vm = lab.vm("brief1", "02:15:5d:00:03:01")
    config = site.config()
    config["ports"]["brief1"] = {"switch": "ext0", "device": "brief1", "mac": vm.mac}
    instance = start(config)
    instance.hear(vm)
    assert instance.port("brief1")["path"] == "queue"
    instance.stop(signal.SIGKILL)
    lab.unplug(vm)
    written = instance.paths.journal.read_text()
    instance.cli("plan", str(instance.file))
    assert instance.paths.journal.read_text() == written  # a plan changes nothing at all
    instance.cli("detach", "--all")
    assert_unchanged(before, site.snapshot)
    assert instance.paths.journal.read_text() == ""
    assert pins(instance) == []


# A hundred ports


@pytest.fixture(scope="module")
def crowd(privilege: None) -> Iterator[tuple[Lab, Namespace, dict[str, str]]]:
    """A lab with a NIC and a hundred veth ports, whose other ends are in one namespace. Scope: the module."""
    with Lab() as lab:
        vms = lab.namespace("vms")
        macs = {f"web{n}": f"02:15:5d:00:00:{n:02x}" for n in range(1, MANY + 1)}
        lines = [
            line
            for name, mac in macs.items()
            for line in (
                f"link add {name} type veth peer name p{name} address {mac} netns {vms.name}",
                f"link set {name} up",
            )
        ]
        batch(lab.host, lines)
        batch(vms, [f"link set p{name} up" for name in macs])
        settled(lab.host)
        yield lab, vms, macs


def batch(ns: Namespace, lines: list[str]) -> None:
    """Many ``ip`` commands at once."""
    ns.run("sh", "-c", 'printf "%s\\n" "$@" | ip -batch -', "sh", *lines)


def test_killed_while_it_hurries(crowd: tuple[Lab, Namespace, dict[str, str]]) -> None:
    """The kernel's grace periods are nobody's hurry any more once the next daemon is there."""
    lab, _, macs = crowd
    before = snapshot(lab.host)
    with Instance(lab.host, config_of(lab.nic, macs)) as instance:
        instance.start(ready=False)
        wait_until(lambda: rcu.EXPEDITED.read_text() == "1\n", "ports are attached", 60)
        instance.stop(signal.SIGKILL)
        assert instance.paths.hurrying.exists(), "it was killed too late"
        instance.start()
        assert rcu.EXPEDITED.read_text() == "0\n"
        assert len(instance.json("ports")) == MANY
        instance.cli("detach", "--all")
        assert_unchanged(before, lambda: snapshot(lab.host))


def test_hundred_ports(crowd: tuple[Lab, Namespace, dict[str, str]]) -> None:
    """Little memory, although this daemon compiled its programs; and a second look changes nothing."""
    lab, vms, macs = crowd
    before = snapshot(lab.host)
    with Instance(lab.host, config_of(lab.nic, macs)) as instance:
        instance.paths.cache.unlink()  # nothing is compiled yet
        instance.start()
        for name, mac in macs.items():
            vms.send(f"p{name}", [test_frame(mac, mac)])
        instance.wait_heard(*macs.values())
        assert "ERROR" not in instance.log.read_text()
        ports = instance.json("ports")
        assert [(port["state"], port["path"]) for port in ports] == [("active", "queue")] * MANY
        assert len(instance.json("queues")) == MANY + 1
        changed = snapshot_of(instance)
        assert instance.cli("apply", str(instance.file)).stdout == "nothing to change\n"
        assert snapshot_of(instance) == changed
        assert list(instance.paths.cache.iterdir())
        assert instance.process is not None
        mapped = Path(f"/proc/{instance.process.pid}/maps").read_text()
        assert "LLVM" not in mapped
        assert "libbcc" not in mapped
        print(f"resident: {instance.rss() / 1e6:.1f} MB")
        assert instance.rss() < MEMORY_LIMIT
        instance.cli("detach", "--all")
        instance.process.wait(20)
        assert_unchanged(before, lambda: snapshot(lab.host))
