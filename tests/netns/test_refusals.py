"""Bad input: one clear error with path or device and remedy, the right exit code, and the kernel as it was.

A daemon serves ``eth1`` throughout. Each case asks for a second NIC, ``eth2``, and has one thing
wrong with it. It goes to ``check``, to ``plan`` and ``run`` of another instance that has only
``eth2``, and as an ``apply`` of both NICs to the daemon, whose running state must not change.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload import operate
from offload.client import Client
from offload.errors import OffloadError
from offload.kernel.host import bridges
from tests.instance import Instance, config_of, vms_of
from tests.lab import (
    AS_NOBODY,
    BPF_PROG_TYPE_XDP,
    Lab,
    Namespace,
    Vm,
    xdp_pass,
)
from tests.snapshot import Snapshot, assert_unchanged, pins, settled, snapshot, snapshot_of

pytestmark = pytest.mark.slow

BPF_XDP = 37  # include/uapi/linux/bpf.h
NOBODY = 65534
SPARE_MAC = "02:15:5d:00:02:01"

Config = dict[str, Any]
Finished = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class FurnishedNamespace(Namespace):
    """A namespace whose processes see ``run`` in the place of /run, and there the real /run/netns."""

    run_dir: Path

    def argv(self, *argv: str) -> list[str]:
        mounts = 'mount --rbind /run/netns "$0/netns" && mount --rbind "$0" /run && exec "$@"'
        private = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", mounts, str(self.run_dir))
        return super().argv(*private, *argv)


@dataclass
class Bench:
    """The lab, the daemon on ``eth1`` with its good config, and an instance without a daemon for ``eth2``."""

    lab: Lab
    vms: dict[str, Vm]
    run_dir: Path
    good: Config
    daemon: Instance
    other: Instance

    def snapshot(self) -> Snapshot:
        namespaces = [self.lab.host, self.lab.wire, *(vm.ns for vm in self.vms.values())]
        return snapshot(*namespaces) | snapshot_of(self.daemon)

    def host_snapshot(self) -> Snapshot:
        return snapshot(self.lab.host) | snapshot_of(self.daemon)

    def with_good(self, bad: Config) -> Config:
        """The daemon's config and ``bad`` in one."""
        both = copy.deepcopy(self.good)
        for key, value in bad.items():
            both[key] = {**both[key], **value} if isinstance(value, dict) and key in both else value
        return both


@pytest.fixture(scope="module")
def bench(privilege: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """See ``Bench``. Scope: the module."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "netns").mkdir()
    with ExitStack() as stack:
        lab = stack.enter_context(Lab())
        vms = vms_of(lab, 2)
        vms["spare1"] = lab.vm("spare1", SPARE_MAC)
        ends = "numrxqueues 2 numtxqueues 2"
        lab.host.ip(f"link add eth2 {ends} type veth peer name wire2 {ends} netns {lab.wire.name}")
        lab.wire.ip("link set wire2 up")
        lab.host.ip("link set eth2 up")
        settled(lab.host, lab.wire, *(vm.ns for vm in vms.values()))
        host = FurnishedNamespace(lab.host.name, run_dir)
        good = config_of(lab.nic, {name: vms[name].mac for name in ("web1", "web2")})
        daemon = stack.enter_context(Instance(host, good)).start(speaking=[vms["web1"], vms["web2"]])
        other = stack.enter_context(Instance(host, {}))
        yield Bench(lab, vms, run_dir, good, daemon, other)


@pytest.fixture(scope="module")
def quiet(bench: Bench) -> Snapshot:
    """The host and the daemon while nobody changes anything. Scope: the module."""
    return bench.host_snapshot()


@pytest.fixture(autouse=True)
def nothing_of_the_other(bench: Bench) -> Iterator[None]:
    """A start that should have been refused and was not spoils no other test. Scope: one test."""
    yield
    if bench.other.paths.pin_dir.exists():
        bench.other.cli("detach", "--all", check=False)


def run_offload(instance: Instance, *arguments: str, through: tuple[str, ...] = ()) -> Finished:
    """``offload ARGUMENTS`` that shall fail, started by ``through``; a daemon that starts is ended."""
    command = ("timeout", "20", sys.executable, "-m", "offload", *arguments)
    return instance.host.run(*through, *command, check=False)


def spare() -> Config:
    """A good config of ``eth2`` and one port."""
    config = config_of("eth2", {"spare1": SPARE_MAC})
    config["switches"] = {"ext1": config["switches"].pop("ext0")}
    config["ports"]["spare1"]["switch"] = "ext1"
    return config


def port(number: int, **keys: object) -> Config:
    """A further port of the spare switch; its device does not exist."""
    mac = f"02:15:5d:01:{number >> 8:02x}:{number & 255:02x}"
    return {"switch": "ext1", "device": f"p{number}", "mac": mac, **keys}


def assert_refused(result: Finished, code: int, *told: str) -> None:
    """The exit code, and one error that has every one of ``told``; no traceback, no surprise."""
    log = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
    error = "\n".join(line for line in result.stderr.splitlines() if not log.match(line))
    assert result.returncode == code, f"exit {result.returncode}: {result.stderr}"
    for text in told:
        assert text in error
    assert "Traceback" not in result.stderr
    assert "unexpected" not in error
    assert result.stdout == ""


def test_the_spare_config_is_good(bench: Bench) -> None:
    """Otherwise every refusal below might be for another reason."""
    bench.other.cli("plan", str(bench.other.write(spare())))
    before = snapshot(bench.lab.host, bench.lab.wire)
    bench.daemon.cli("apply", str(bench.daemon.write(bench.with_good(spare()))))
    bench.daemon.hear(bench.vms["spare1"])
    assert bench.daemon.port("spare1")["path"] == "queue"
    bench.daemon.cli("apply", str(bench.daemon.write(bench.good)))
    assert_unchanged(before, lambda: snapshot(bench.lab.host, bench.lab.wire))


# What the parser refuses: nobody even looks at the kernel


def setting(*path: str, to: object) -> Callable[[Config], None]:
    """Put a value at a path of the config."""

    def change(config: Config) -> None:
        *parents, last = path
        for key in parents:
            config = config[key]
        config[last] = to

    return change


def _full_bridge(config: Config) -> None:
    config["ports"] |= {f"p{number}": port(number) for number in range(1022)}


PARSED = [
    pytest.param(setting("nic", to={}), 2, "nic:", "did you mean nics?", id="unknown-key"),
    pytest.param(
        setting("ports", "spare1", "wieght", to=5),
        2,
        "ports.spare1.wieght: 5:",
        "did you mean weight?",
        id="unknown-port-key",
    ),
    pytest.param(
        setting("nics", "eth2", to={"queues": {"max": "four"}}),
        2,
        "nics.eth2.queues.max:",
        "must be a whole number",
        id="text-for-a-number",
    ),
    pytest.param(
        setting("ports", "spare1", to=["eth2"]),
        2,
        "ports.spare1:",
        "must be a mapping",
        id="list-for-a-mapping",
    ),
    pytest.param(
        setting("nics", "eth2", to={"xdp_mode": "natve"}),
        2,
        "nics.eth2.xdp_mode:",
        "native or generic; did you mean native?",
        id="unknown-mode",
    ),
    pytest.param(setting("version", to=2), 2, "version:", "must be 1", id="other-version"),
    pytest.param(
        setting("ports", "twin", to=port(1, mac=SPARE_MAC)),
        2,
        f'ports.twin.mac: "{SPARE_MAC}":',
        "must be unique on nics.eth2 (untagged): ports.spare1 has it",
        id="duplicate-filter",
    ),
    pytest.param(
        setting("switches", "ext2", to={"type": "external", "uplink": "eth2"}),
        2,
        "switches.ext2.uplink:",
        "must be a NIC of its own: switches.ext1 has this one",
        id="two-switches-on-one-uplink",
    ),
    pytest.param(
        setting("ports", "spare1", "mac", to="03:15:5d:00:02:01"),
        2,
        "ports.spare1.mac:",
        "the lowest bit of the first octet must be 0",
        id="group-address",
    ),
    pytest.param(
        setting("ports", "spare1", "vlan", to=4095),
        2,
        "ports.spare1.vlan: 4095:",
        "use 1 to 4094",
        id="vid-4095",
    ),
    pytest.param(
        _full_bridge,
        2,
        "switches.ext1:",
        "has 1024 devices, uplink included; a kernel bridge takes 1023",
        id="full-bridge",
    ),
]


@pytest.mark.parametrize(("spoil", "code", "path", "allowed"), PARSED)
def test_parser_refuses(
    bench: Bench, quiet: Snapshot, spoil: Callable[[Config], None], code: int, path: str, allowed: str
) -> None:
    bad = spare()
    spoil(bad)
    file = bench.other.write(bad, "bad.yaml")
    for command in (("check", file), ("run", "--config", file, *bench.other.options)):
        result = run_offload(bench.other, *map(str, command))
        assert_refused(result, code, path, allowed)
        assert len([line for line in result.stderr.splitlines() if "warning: " not in line]) == 1
    with pytest.raises(OffloadError) as planned:
        operate.plan(file.read_text(), str(file), bench.other.paths)
    with pytest.raises(OffloadError) as applied, Client(bench.daemon.paths.socket) as client:
        client.apply(json.dumps(bench.with_good(bad)), "bad.yaml")
    for error in (planned.value, applied.value):
        assert error.exit_code == code
        assert path in str(error)
        assert allowed in str(error)
    assert_nothing_left(bench.other)
    assert_unchanged(quiet, bench.host_snapshot)


# What is wrong with this host


@contextmanager
def commands(ns: Namespace, undo: str, *do: str) -> Iterator[None]:
    """Run ``ip`` commands in ``ns``, and ``undo`` at the end."""
    for command in do:
        ns.ip(command)
    try:
        yield
    finally:
        ns.ip(undo)


@contextmanager
def foreign_xdp(ns: Namespace, device: str) -> Iterator[None]:
    """A program attached by netlink, as ``ip link set DEVICE xdp`` does."""
    xdp_pass(ns, device)
    with commands(ns, f"link set {device} xdp off"):
        yield


@contextmanager
def foreign_xdp_link(ns: Namespace, device: str) -> Iterator[None]:
    """A program attached by a link, as libxdp and Cilium do."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    code = struct.pack("=BBhi", 0xB7, 0, 0, 2) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # return XDP_PASS
    program = libbpf.bpf_prog_load(BPF_PROG_TYPE_XDP, b"foreign", b"GPL", code, ctypes.c_size_t(2), None)
    assert program >= 0, os.strerror(ctypes.get_errno())
    ifindex = ns.ifindex(device)
    link = ns.call(lambda: int(libbpf.bpf_link_create(program, ifindex, BPF_XDP, None)))
    os.close(program)
    assert link >= 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.close(link)


@contextmanager
def process(ns: Namespace, name: str, *arguments: str) -> Iterator[None]:
    """A process in ``ns`` that is called ``name`` and does nothing."""
    body = f"open('/proc/self/comm', 'w').write({name!r}); print(flush=True); import time; time.sleep(60)"
    command = [name, "-c", body, *arguments]
    started = ns.call(lambda: subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE))
    try:
        assert started.stdout is not None
        started.stdout.readline()  # it has its name
        yield
    finally:
        started.kill()
        started.communicate()


@contextmanager
def existing(path: Path, content: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    try:
        yield
    finally:
        path.unlink()


@contextmanager
def lopsided_pair(ns: Namespace) -> Iterator[None]:
    """``eth3`` with one RX queue, and another end that sends to four."""
    with commands(
        ns,
        "link delete eth3",
        "link add eth3 numrxqueues 1 type veth peer name peer3 numtxqueues 4",
        "link set eth3 up",
        "link set peer3 up",
    ):
        ns.run("ethtool", "-L", "peer3", "tx", "4")
        yield


@dataclass(frozen=True)
class Trouble:
    """Something wrong with the host while ``config`` is asked for, the exit code, and what is told."""

    code: int
    told: tuple[str, ...]
    arrange: Callable[[Bench, ExitStack], object] = lambda bench, stack: None
    change: Callable[[Config], None] = lambda config: None


def _uplink(name: str, **keys: object) -> Callable[[Config], None]:
    """Have another NIC than eth2."""

    def change(config: Config) -> None:
        config["nics"] = {name: keys}
        config["switches"]["ext1"]["uplink"] = name

    return change


def _managed(manager: str, path: str, content: str) -> Callable[[Bench, ExitStack], None]:
    """A manager's process, and its file about eth2."""

    def arrange(bench: Bench, stack: ExitStack) -> None:
        host = bench.lab.host
        stack.enter_context(process(host, manager))
        where = bench.run_dir / path.format(ifindex=host.ifindex("eth2"))
        stack.enter_context(existing(where, content))

    return arrange


def _in_host(context: Callable[..., Any], *arguments: str) -> Callable[[Bench, ExitStack], None]:
    return lambda bench, stack: stack.enter_context(context(bench.lab.host, *arguments))


TROUBLES = {
    "no-such-cpu-for-a-nic": Trouble(
        2,
        ("nics.eth2.queues.cpus", "4000", "a CPU that is online: 0"),
        change=setting("nics", "eth2", to={"queues": {"cpus": [0, 4000]}}),
    ),
    "no-such-cpu-for-a-port": Trouble(
        2,
        ("ports.spare1.cpu", "4000", "a CPU that is online: 0"),
        change=setting("ports", "spare1", "cpu", to=4000),
    ),
    "no-such-nic": Trouble(2, ("nics.eth9", "`ip -br link` lists them"), change=_uplink("eth9")),
    "foreign-xdp": Trouble(
        1,
        ("eth2 has a foreign XDP program (id ", "`ip link set eth2 xdp off`"),
        _in_host(foreign_xdp, "eth2"),
    ),
    "foreign-xdp-link": Trouble(
        1,
        ("eth2 has a foreign XDP program (id ", "`offload doctor` tells whose"),
        _in_host(foreign_xdp_link, "eth2"),
    ),
    "foreign-bridge": Trouble(
        1,
        ("eth2 is already in other0, which is not ours", "`ip link set eth2 nomaster`"),
        _in_host(
            commands, "link delete other0", "link add other0 type bridge", "link set eth2 master other0"
        ),
    ),
    "foreign-bridge-with-the-switch's-name": Trouble(
        1,
        ("there is a device ext1 already", "rename one"),
        _in_host(commands, "link delete ext1", "link add ext1 type bridge"),
    ),
    "address": Trouble(
        1,
        ("eth2 carries the host's address 198.51.100.1/24", "`ip addr del 198.51.100.1/24 dev eth2`"),
        _in_host(commands, "address delete 198.51.100.1/24 dev eth2", "address add 198.51.100.1/24 dev eth2"),
    ),
    "dhclient": Trouble(
        1,
        ("eth2 is managed by dhclient (process ", "dhclient -r eth2"),
        _in_host(process, "dhclient", "eth2"),
    ),
    "NetworkManager": Trouble(
        1,
        ("eth2 is managed by NetworkManager (", "nmcli device set eth2 managed no"),
        _managed("NetworkManager", "NetworkManager/devices/{ifindex}", "[device]\nmanaged=true\n"),
    ),
    "networkd": Trouble(
        1,
        ("eth2 is managed by systemd-networkd (", "Unmanaged=yes", "networkctl reload"),
        _managed(
            "systemd-networkd",
            "systemd/netif/links/{ifindex}",
            "ADMIN_STATE=configured\nNETWORK_FILE=/x.network\n",
        ),
    ),
    "vlan-without-filtering": Trouble(
        3,
        ("ports.spare1.vlan: 10", "no VLAN filtering", "VLAN 10 would leak", "use `bridge: python`"),
        change=setting("ports", "spare1", "vlan", to=10),
    ),
}

FAILS_HALF_WAY = {
    "no-native-xdp": Trouble(
        3,
        ("attach XDP to ifb2 in native mode", "`nics.ifb2.xdp_mode: generic`"),
        _in_host(commands, "link delete ifb2", "link add ifb2 type ifb", "link set ifb2 up"),
        _uplink("ifb2"),
    ),
    "fewer-rx-queues-than-the-peer-sends-to": Trouble(
        3,
        ("attach XDP to eth3 in native mode", "fewer RX queues than its other end", "`ethtool -L eth3 rx N`"),
        lambda bench, stack: stack.enter_context(lopsided_pair(bench.lab.host)),
        _uplink("eth3"),
    ),
}
"""What only the kernel knows: it says no when the NIC is in its bridge already and its ports are guarded."""


@pytest.mark.parametrize("name", TROUBLES)
def test_host_is_in_the_way(bench: Bench, name: str) -> None:
    if name == "vlan-without-filtering" and bridges()[1].state == "yes":
        pytest.skip("this kernel's bridge filters VLANs")
    _refused_everywhere(bench, TROUBLES[name], planned=True)


@pytest.mark.parametrize("name", FAILS_HALF_WAY)
def test_failure_half_way_is_undone(bench: Bench, name: str) -> None:
    _refused_everywhere(bench, FAILS_HALF_WAY[name], planned=False)


def _refused_everywhere(bench: Bench, trouble: Trouble, *, planned: bool) -> None:
    """``plan`` (where it can know), ``run`` and ``apply`` refuse, and each leaves everything as it was."""
    bad = spare()
    trouble.change(bad)
    with ExitStack() as stack:
        trouble.arrange(bench, stack)
        settled(bench.lab.host)
        before = bench.snapshot()
        file = str(bench.other.write(bad, "bad.yaml"))
        options = bench.other.options
        result = run_offload(bench.other, "plan", file, *options)
        if planned:
            assert_refused(result, trouble.code, *trouble.told)
        else:
            assert result.returncode == 0
        result = run_offload(bench.other, "run", "--config", file, *options)
        assert_refused(result, trouble.code, *trouble.told)
        assert_nothing_left(bench.other)
        both = str(bench.daemon.write(bench.with_good(bad), "bad.yaml"))
        assert_refused(bench.daemon.cli("apply", both, check=False), trouble.code, *trouble.told)
        assert_unchanged(before, bench.snapshot)


def assert_nothing_left(instance: Instance) -> None:
    """A start that was refused has left no pin and no setting to give back."""
    assert pins(instance) == []
    journal = instance.paths.journal
    assert not journal.exists() or journal.read_text() == ""


def test_generic_mode_works_where_native_does_not(bench: Bench) -> None:
    with commands(bench.lab.host, "link delete ifb2", "link add ifb2 type ifb", "link set ifb2 up"):
        config = spare()
        _uplink("ifb2", xdp_mode="generic")(config)
        before = snapshot(bench.lab.host, bench.vms["spare1"].ns)
        with Instance(bench.daemon.host, config) as generic:
            generic.start(speaking=[bench.vms["spare1"]])
            (nic,) = generic.json("nics")
            assert nic["mode"] == "generic"
            assert generic.port("spare1")["path"] == "queue"
            generic.cli("detach", "--all")
        assert_unchanged(before, lambda: snapshot(bench.lab.host, bench.vms["spare1"].ns))


# What is wrong with one port only


def test_port_in_a_foreign_bridge_fails_alone(bench: Bench) -> None:
    host = bench.lab.host
    with commands(host, "link delete other0", "link add other0 type bridge", "link set spare1 master other0"):
        before = bench.snapshot()
        config = copy.deepcopy(bench.good)
        config["ports"]["spare1"] = {"switch": "ext0", "device": "spare1", "mac": SPARE_MAC}
        bench.daemon.cli("apply", str(bench.daemon.write(config)))
        failed = bench.daemon.port("spare1")
        assert (failed["state"], failed["path"]) == ("failed", "bridge")
        assert failed["reason"] == "spare1 is in other0, which is not ours: `ip link set spare1 nomaster`"
        assert bench.daemon.port("web1")["path"] == "queue"
        theirs = {key: value for key, value in before.items() if "spare1" in key or "other0" in key}
        now = bench.snapshot()
        assert {key: now.get(key) for key in theirs} == theirs
        bench.daemon.cli("apply", str(bench.daemon.write(bench.good)))


def test_recycled_vnet_name_waits_for_its_own_vm(bench: Bench) -> None:
    """libvirt gives a tap the MAC of its guest with the first byte fe; this one is another guest's."""
    host = bench.lab.host
    tap = bench.lab.tap("vnet7")
    host.ip("link set vnet7 address fe:15:5d:00:09:09")
    settled(host)
    config = copy.deepcopy(bench.good)
    config["ports"]["spare1"] = {"switch": "ext0", "device": "vnet7", "mac": SPARE_MAC}
    before = snapshot(host)
    bench.daemon.cli("apply", str(bench.daemon.write(config)))
    waiting = bench.daemon.port("spare1")
    assert waiting["state"] == "waiting"
    assert "vnet7 belongs to another VM (its MAC is fe:15:5d:00:09:09)" in waiting["reason"]
    assert "<target dev='spare1'/>" in waiting["reason"]
    assert_unchanged(before, lambda: snapshot(host))
    host.ip(f"link set vnet7 address fe:{SPARE_MAC[3:]}")
    bench.daemon.wait_port("spare1", state="active")
    tap.announce(SPARE_MAC)
    bench.daemon.wait_port("spare1", path="queue")
    bench.daemon.cli("apply", str(bench.daemon.write(bench.good)))


# What the process lacks


def _as_nobody(instance: Instance, *arguments: str) -> Finished:
    return run_offload(instance, *arguments, through=AS_NOBODY)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(("plan", "FILE"), "CAP_BPF is missing", id="plan"),
        pytest.param(("run", "--config", "FILE"), "CAP_BPF is missing", id="run"),
        pytest.param(("detach", "--all"), "CAP_BPF is missing", id="detach"),
    ],
)
def test_without_privilege(bench: Bench, arguments: tuple[str, ...], told: str) -> None:
    """The directories may be written, so that it is the capability that is missing."""
    before = bench.snapshot()
    with Instance(bench.daemon.host, spare()) as theirs:
        theirs.directory.chmod(0o755)
        for directory in (theirs.directory, theirs.paths.state_dir):
            os.chown(directory, NOBODY, NOBODY)
        named = [str(theirs.file) if word == "FILE" else word for word in arguments]
        assert_refused(_as_nobody(theirs, *named, *theirs.options), 4, told, "run as root")
        assert pins(theirs) == []
    assert_unchanged(before, bench.snapshot)


@pytest.mark.parametrize("command", ["status", "apply", "detach", "run"])
def test_without_privilege_at_a_root_daemon(bench: Bench, command: str) -> None:
    arguments = {"apply": [str(bench.daemon.file)], "run": ["--config", str(bench.daemon.file)]}
    bench.daemon.directory.chmod(0o755)
    bench.daemon.file.chmod(0o644)
    before = bench.snapshot()
    named = arguments.get(command, [])
    assert_refused(
        _as_nobody(bench.daemon, command, *named, *bench.daemon.options), 4, str(bench.daemon.paths.run_dir)
    )
    assert_unchanged(before, bench.snapshot)


def test_check_needs_no_privilege(bench: Bench) -> None:
    bench.daemon.directory.chmod(0o755)
    bench.daemon.file.chmod(0o644)
    assert _as_nobody(bench.daemon, "check", str(bench.daemon.file)).returncode == 0


@pytest.mark.parametrize("command", [("plan",), ("run", "--config")], ids=["plan", "run"])
def test_pin_directory_without_bpffs(bench: Bench, command: tuple[str, ...], tmp_path: Path) -> None:
    before = bench.snapshot()
    file = str(bench.other.write(spare()))
    pin_dir = tmp_path / "pins"
    directories = (*bench.other.options[:-2], "--pin-dir", str(pin_dir))
    result = run_offload(bench.other, *command, file, *directories)
    assert_refused(result, 3, f"{tmp_path} is not on a BPF file system", f"mount -t bpf bpf {pin_dir}")
    assert not pin_dir.exists()
    assert_unchanged(before, bench.snapshot)


@pytest.mark.parametrize("command", [("plan",), ("run", "--config")], ids=["plan", "run"])
def test_kernel_without_btf(bench: Bench, command: tuple[str, ...]) -> None:
    before = bench.snapshot()
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', "sh")
    file = str(bench.other.write(spare()))
    result = run_offload(bench.other, *command, file, *bench.other.options, through=hide)
    assert_refused(result, 3, "/sys/kernel/btf/vmlinux does not exist", "CONFIG_DEBUG_INFO_BTF=y")
    assert_nothing_left(bench.other)
    assert_unchanged(before, bench.snapshot)


@pytest.mark.parametrize("command", [("plan",), ("run", "--config")], ids=["plan", "run"])
def test_ifupdown_manages_the_uplink(bench: Bench, command: tuple[str, ...]) -> None:
    """ifupdown is asked about where process 1 is, so the command gets a process namespace of its own."""
    before = bench.snapshot()
    apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    arguments = (*command, str(bench.other.write(spare())), *bench.other.options)
    with existing(bench.run_dir / "network/ifstate", "lo=lo\neth2=eth2\n"):
        result = run_offload(bench.other, *arguments, through=apart)
    assert_refused(result, 1, "eth2 is managed by ifupdown (", "ifdown eth2", "/etc/network/interfaces")
    assert_nothing_left(bench.other)
    assert_unchanged(before, bench.snapshot)
