"""``port add``, ``port set`` and ``port remove`` on a running daemon. Needs root.

One daemon serves all tests: ``web1`` comes from its config file, and its NIC has two queues to give.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from offload.client import Client
from offload.kernel import host
from tests.instance import Instance, config_of, vms_of
from tests.lab import Lab, Vm
from tests.snapshot import Snapshot, assert_unchanged, settled, snapshot, snapshot_of

pytestmark = pytest.mark.slow

FIRST, LAST = "02:15:5d:00:0a:00", "02:15:5d:00:0a:02"


@dataclass
class Site:
    """The lab, its VMs and the daemon; and what all of it is like with web1 alone."""

    lab: Lab
    vms: dict[str, Vm]
    daemon: Instance
    empty: Snapshot = field(default_factory=dict)

    def snapshot(self) -> Snapshot:
        """Everything of the kernel and of the daemon's, the table's history aside."""
        namespaces = (self.lab.host, self.lab.wire, *(vm.ns for vm in self.vms.values()))
        everything = snapshot(*namespaces) | snapshot_of(self.daemon)
        return {key: value for key, value in everything.items() if not key.endswith("/classifier")}

    def add(self, name: str, *options: str) -> None:
        """Add a port for the VM ``name``, whose device has the same name, and hear from it."""
        self.daemon.cli("port", "add", name, *self.place(name), "--mac", self.vms[name].mac, *options)
        self.daemon.hear(self.vms[name])

    @staticmethod
    def place(device: str) -> tuple[str, ...]:
        return ("--switch", "ext0", "--device", device)

    def refused(self, code: int, *arguments: str) -> str:
        """The one line that says why; the pins, tables and files are as they were.

        What else there is of the kernel is compared at the end of each test.
        """
        before = snapshot_of(self.daemon)
        result = self.daemon.cli(*arguments, check=False)
        assert result.returncode == code
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert snapshot_of(self.daemon) == before
        return line

    def restart(self) -> None:
        self.daemon.stop()
        self.daemon.start()


@pytest.fixture(scope="module")
def module_site(privilege: None) -> Iterator[Site]:
    """See ``Site``. Scope: the module."""
    with Lab() as lab:
        vms = vms_of(lab, 4)
        settled(lab.host, lab.wire, *(vm.ns for vm in vms.values()))
        config = config_of(lab.nic, {"web1": vms["web1"].mac})
        config["nics"]["eth1"] = {"queues": {"max": 2}}
        config["mac_range"] = {"first": FIRST, "last": LAST}
        with Instance(lab.host, config) as daemon:
            site = Site(lab, vms, daemon.start(speaking=[vms["web1"]]))
            site.empty = _settled(site.snapshot())
            yield site


@pytest.fixture
def site(module_site: Site) -> Iterator[Site]:
    """``Site`` without any port but web1, before and after. Scope: one test."""
    yield module_site
    with Client(module_site.daemon.paths.socket) as client:
        for port in client.ports():
            if port.source != "config":
                client.port_remove(port.name)
    assert_unchanged(module_site.empty, lambda: _settled(module_site.snapshot()))


def _settled(state: Snapshot) -> Snapshot:
    """Without the daemon's handles and the files: both are made when they are first needed."""
    return {key: value for key, value in state.items() if not key.startswith(("held", "file"))}


def test_files_and_restart(site: Site) -> None:
    paths = site.daemon.paths
    site.add("web2", "--keep", "--weight", "50")
    site.add("web3", "--weight", "40", "--cpu", "0")
    assert [file.name for file in paths.state_ports.iterdir()] == ["web2.yaml"]
    assert [file.name for file in paths.run_ports.iterdir()] == ["web3.yaml"]
    listed = site.daemon.json("ports")
    assert [(port["name"], port["source"]) for port in listed] == [
        ("web1", "config"),
        ("web2", "keep"),
        ("web3", "run"),
    ]
    before = site.snapshot()
    site.restart()
    assert_unchanged(_settled(before), lambda: _settled(site.snapshot()))
    after = site.daemon.json("ports")
    assert [{**port, "counters": None} for port in after] == [{**port, "counters": None} for port in listed]
    site.daemon.cli("port", "set", "web2", "--weight", "60")
    site.restart()
    assert [site.daemon.port(name)["weight"] for name in ("web2", "web3")] == [60, 40]
    assert site.daemon.port("web2")["source"] == "keep"
    for name in ("web2", "web3"):
        site.daemon.cli("port", "remove", name)
    assert not list(paths.state_ports.iterdir())
    assert not list(paths.run_ports.iterdir())
    assert site.daemon.cli("port", "remove", "web2", check=False).returncode == 2


@pytest.mark.parametrize(
    "command", [("set", "web1", "--weight", "5"), ("remove", "web1")], ids=["set", "remove"]
)
def test_port_of_the_config_file_is_refused(site: Site, command: tuple[str, ...]) -> None:
    told = site.refused(2, "port", *command)
    file = site.daemon.file
    assert told == f"port web1 is of the config file {file}: change it there, then `offload apply {file}`"


@pytest.mark.parametrize(
    ("code", "command", "told"),
    [
        pytest.param(
            2, ("set", "web9", "--weight", "5"), "there is no port web9: `offload ports`", id="set-unknown"
        ),
        pytest.param(
            2, ("remove", "web9"), "there is no port web9: `offload ports` lists them", id="remove-unknown"
        ),
        pytest.param(
            2,
            ("add", "web1", *Site.place("web2")),
            "port web1 exists already: `offload port set web1",
            id="add-again",
        ),
        pytest.param(
            2,
            ("add", "web2", *Site.place("web2"), "--mac", "03:00:00:00:00:01"),
            "ports.web2.mac: 03:00:00:00:00:01: a group address",
            id="group-address",
        ),
        pytest.param(
            2,
            ("add", "web2", *Site.place("web2"), "--mac", "02:15:5d:00:00:01"),
            "ports.web1 has it",
            id="duplicate-filter",
        ),
        pytest.param(
            2, ("add", "web2", *Site.place("web1")), "ports.web1.device has this one", id="same-device"
        ),
        pytest.param(
            2,
            ("add", "web2", "--switch", "ext9", "--device", "web2"),
            "ports.web2.switch: ext9: must be listed under switches",
            id="no-such-switch",
        ),
        pytest.param(
            2,
            ("add", "web2", *Site.place("web2"), "--cpu", "4000"),
            "ports.web2.cpu: 4000: a CPU that is online",
            id="no-such-cpu",
        ),
        pytest.param(
            3, ("add", "web2", *Site.place("web2"), "--vlan", "10"), "VLAN 10 would leak", id="vlan"
        ),
        pytest.param(
            3,
            ("add", "web2", *Site.place("web2"), "--queue", "hardware"),
            "ports.web2.queue: hardware: eth1 has none for it",
            id="hardware-queue",
        ),
    ],
)
def test_refusals(site: Site, code: int, command: tuple[str, ...], told: str) -> None:
    """Also no file is written, and no address of the range is held for a port that is not there."""
    if "--vlan" in command and host.bridges()[1].state == "yes":
        pytest.skip("this kernel's bridge filters VLANs")
    assert told in site.refused(code, "port", *command)


@pytest.mark.parametrize("device", ["web1", "web2"], ids=["another-port", "this-port"])
def test_what_somebody_did_just_before_a_command_is_put_right_with_it(site: Site, device: str) -> None:
    """The daemon hears of both at one time: it stands still meanwhile."""
    site.add("web2")
    assert site.daemon.process
    with Client(site.daemon.paths.socket) as client, ThreadPoolExecutor(1) as pool:
        site.daemon.process.send_signal(signal.SIGSTOP)
        try:
            site.lab.host.ip(f"link set {device} nomaster")
            answer = pool.submit(client.port_set, "web2", {"weight": 7})
        finally:
            site.daemon.process.send_signal(signal.SIGCONT)
        answer.result(20)
        assert " master ext0 " in site.lab.host.ip(f"link show {device}")
        assert site.daemon.port("web2")["weight"] == 7
        left = client.apply(site.daemon.file.read_text(), str(site.daemon.file), dry_run=True)
        assert left.changes == []


def test_a_port_that_was_refused_can_be_added_right(site: Site) -> None:
    site.refused(3, "port", "add", "web2", *site.place("web2"), "--queue", "hardware")
    site.add("web2")
    assert site.daemon.port("web2")["path"] == "queue"


@pytest.mark.parametrize(
    "command",
    [
        ("add", "web3", *Site.place("web3"), "--mac", "auto", "--keep"),
        ("set", "web2", "--queue", "off"),
        ("remove", "web2"),
    ],
    ids=lambda command: command[0],
)
def test_dry_run_changes_nothing(site: Site, command: tuple[str, ...]) -> None:
    site.add("web2")
    before = site.snapshot()
    told = json.loads(site.daemon.cli("port", *command, "--dry-run", "--json").stdout)
    assert told["changes"]
    assert_unchanged(before, site.snapshot)
    site.daemon.cli("port", *command)
    assert site.snapshot() != before


def test_automatic_address_is_stable_and_released(site: Site) -> None:
    def add(name: str) -> str:
        site.daemon.cli("port", "add", name, *site.place(name), "--mac", "auto")
        (mac,) = site.daemon.port(name)["mac"]
        return str(mac)

    assert add("web2") == FIRST
    third = add("web3")
    site.restart()
    assert [site.daemon.port(name)["mac"] for name in ("web2", "web3")] == [[FIRST], [third]]
    site.daemon.cli("port", "set", "web2", "--weight", "10")
    assert site.daemon.port("web2")["mac"] == [FIRST]
    add("web4")
    told = site.refused(2, "port", "add", "web5", *site.place("web5"), "--mac", "auto")
    assert "no address is left for port web5: of 3 in the range, 3 are held" in told
    site.daemon.cli("port", "remove", "web3")
    assert add("web5") == third
    assert f"{third} dev web3" not in site.lab.host.run("bridge", "fdb", "show", "br", "ext0").stdout


def test_address_given_by_hand_releases_the_automatic_one(site: Site) -> None:
    site.daemon.cli("port", "add", "web2", *site.place("web2"), "--mac", "auto")
    site.daemon.cli("port", "set", "web2", "--mac", site.vms["web2"].mac)
    site.daemon.cli("port", "add", "web3", *site.place("web3"), "--mac", "auto")
    assert site.daemon.port("web3")["mac"] == [FIRST]


def test_queues_run_out_and_the_highest_weight_gets_the_freed_one(site: Site) -> None:
    site.add("web2", "--weight", "10")
    site.add("web3", "--weight", "50")
    site.add("web4", "--weight", "90")
    given = site.daemon.port("web2")["queue"]
    assert given is not None  # who has a queue keeps it
    for name in ("web3", "web4"):
        port = site.daemon.port(name)
        assert (port["state"], port["path"], port["queue"]) == ("active", "bridge", None)
        assert port["reason"] == "no queue is left: queues.max of the NIC is reached"
    (nic,) = site.daemon.json("nics")
    assert nic["queues_waiting"] == 2
    site.daemon.cli("port", "remove", "web2")
    assert site.daemon.port("web3")["path"] == "bridge"
    port = site.daemon.port("web4")
    assert (port["path"], port["queue"]["id"], port["reason"]) == ("queue", given["id"], None)
    site.daemon.cli("port", "set", "web4", "--queue", "off")
    assert site.daemon.port("web3")["path"] == "queue"
    port = site.daemon.port("web4")
    assert (port["path"], port["queue"], port["reason"]) == ("bridge", None, "queue: off")
    site.restart()
    assert site.daemon.port("web3")["path"] == "queue"


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--queue", "off"), "queue: off"), (("--weight", "0"), "weight: 0")],
    ids=["queue-off", "weight-0"],
)
def test_port_without_a_queue(site: Site, options: tuple[str, ...], reason: str) -> None:
    """It is not among those who wait, either; and it gets one when it is asked for again."""
    site.add("web2", *options)
    port = site.daemon.port("web2")
    assert (port["path"], port["queue"], port["reason"]) == ("bridge", None, reason)
    (nic,) = site.daemon.json("nics")
    assert (nic["queues_waiting"], nic["filters"]) == (0, 1)
    site.daemon.cli("port", "set", "web2", "--queue", "auto", "--weight", "1")
    assert site.daemon.port("web2")["path"] == "queue"


def test_device_that_appears_later(site: Site) -> None:
    vm = site.lab.vm("late1", "02:15:5d:00:03:01")
    site.lab.unplug(vm)
    site.daemon.cli("port", "add", "late1", *site.place("late1"), "--mac", vm.mac)
    waiting = site.daemon.port("late1")
    assert (waiting["state"], waiting["path"]) == ("waiting", "bridge")
    assert waiting["reason"] == "there is no device late1 yet"
    for again in (True, True, False):
        site.lab.plug(vm)
        port = site.daemon.wait_port("late1", state="active")
        assert (port["path"], port["reason"]) == ("bridge", f"nothing has been heard from {vm.mac} yet")
        site.daemon.hear(vm)
        port = site.daemon.port("late1")
        assert (port["path"], port["reason"]) == ("queue", None)
        if again:
            site.lab.unplug(vm)
            site.daemon.wait_port("late1", state="waiting")
    site.daemon.cli("port", "remove", "late1")
    assert "ext0" not in site.lab.host.ip("link show late1")
    site.lab.unplug(vm)
