"""Consumers of AF_XDP ports that get their sockets from a running daemon. Needs root.

Consumers are processes of ``nobody`` without any capability, unless said otherwise. One daemon serves
most tests: ``db1`` is nobody's and has the NIC's queues, too; ``db2`` is root's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import multiprocessing
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from offload.closing import Closing
from offload.errors import KernelError
from offload.errors import PrivilegeError as OurPrivilegeError
from offload.kernel.bpf import Map
from offload.kernel.channels import Channels
from offload.kernel.links import Links
from offload.kernel.netns import call_in
from offload.kernel.sockets import Supply, takes_frags
from offload.xsk import abi, handed
from offload.xsk.bound import BoundSocket
from offload.xsk.errors import PrivilegeError, XskError
from offload.xsk.socket import Socket
from offload.xsk.umem import Umem, UmemShape
from tests.instance import Instance, config_of
from tests.lab import AS_NOBODY, WIRE_MAC, Lab, handed_over, seq_of, test_frame, wait_until

NOBODY = pwd.getpwnam("nobody")
DB1, DB2 = "02:15:5d:00:00:11", "02:15:5d:00:00:12"
BROADCAST = "ff:ff:ff:ff:ff:ff"
QUEUES = 4
FEW = 256
"""Chunks of a UMEM."""


@dataclass
class Held:
    """What a consumer's process has."""

    sockets: list[Socket] = field(default_factory=list)
    bound: list[BoundSocket] = field(default_factory=list)


class Consumer(Closing):
    """A process that does what it is told: functions of this module, which get ``Held`` and arguments."""

    def __init__(self, *, privileged: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_consume, args=(theirs, privileged), daemon=True)
        self.process.start()
        theirs.close()

    def do(self, function: Callable[..., Any], *arguments: object) -> Any:
        """What the function returns; raises what it raised."""
        self._pipe.send((function, arguments))
        assert self._pipe.poll(20), f"{function.__name__} takes too long"
        failed, result = self._pipe.recv()
        if failed:
            raise result
        return result

    def kill(self) -> None:
        """End it without any last words."""
        self.process.kill()
        self.process.join(5)

    def close(self) -> None:
        self.kill()
        self._pipe.close()


def _consume(pipe: Connection, privileged: bool) -> None:
    if not privileged:
        os.setgroups([])
        os.setgid(NOBODY.pw_gid)
        os.setuid(NOBODY.pw_uid)
    held = Held()
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((False, function(held, *arguments)))
        except Exception as error:  # noqa: BLE001  # it is raised again in the test
            pipe.send((True, _plain(error)))


def _plain(error: Exception) -> Exception:
    """``error``, or its words where it cannot be sent to another process."""
    if isinstance(error, handed.RefusedError):
        return handed.RefusedError(str(error))
    if isinstance(error, XskError):
        return type(error)(error.errno or 0, str(error))
    return error


# What consumers do


def take(held: Held, path: Path, device: str = "xsk0", queue: int = 0) -> str:
    """Get a socket; returns the capabilities that the process has."""
    with handed.connect(path) as provider:
        held.bound.append(provider.socket(device, queue, FEW))
    held.sockets.append(Socket(held.bound[-1]))
    status = Path("/proc/self/status").read_text().splitlines()
    return " ".join(line.split()[1] for line in status if line.startswith(("CapEff", "CapPrm")))


def take_only(held: Held, path: Path, device: str, queue: int) -> None:
    """Get a socket, and do nothing with it."""
    with handed.connect(path) as provider:
        held.bound.append(provider.socket(device, queue, FEW))


def use(held: Held) -> None:
    """Begin with the socket that was got last."""
    held.sockets.append(Socket(held.bound[-1]))


def receive(held: Held, count: int, seconds: float = 5) -> list[int | None]:
    """Sequence numbers of the first ``count`` frames at any socket, fewer when no more come."""
    found: list[int | None] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        for each in held.sockets:
            with each.receive(timeout=0.01) as batch:
                found += [seq_of(bytes(frame)) for frame in batch]
    return found


def send(held: Held, frames: list[bytes]) -> int:
    return held.sockets[0].send(frames, timeout=1)


def bind_own(held: Held, path: Path, netns: str) -> None:
    """What DPDK does: a socket of one's own, put into the map."""
    held.bound.append(call_in(netns, lambda: BoundSocket.bind(Umem(UmemShape(FEW)), "xsk0")))
    with handed.connect(path) as provider, provider.map("xsk0") as xsks:
        xsks.insert(0, held.bound[-1])
    held.sockets.append(Socket(held.bound[-1]))


def try_to_send(held: Held) -> dict[str, int | None]:
    """Errnos of every way that there is from a socket without a TX ring to sending."""
    raw = socket.socket(abi.AF_XDP, socket.SOCK_RAW, fileno=os.dup(held.bound[0].fileno()))

    def tried(function: Callable[[], object]) -> int | None:
        try:
            function()
        except OSError as error:
            return error.errno
        return None

    with raw:
        return {
            "send": tried(lambda: raw.send(b"", socket.MSG_DONTWAIT)),
            "send bytes": tried(lambda: raw.send(b"\xff" * 64, socket.MSG_DONTWAIT)),
            "add a TX ring": tried(lambda: raw.setsockopt(abi.SOL_XDP, abi.XDP_TX_RING, 64)),
            "map a TX ring": tried(lambda: mmap.mmap(raw.fileno(), 4096, offset=abi.XDP_PGOFF_TX_RING)),
            "another socket": tried(lambda: socket.socket(abi.AF_XDP, socket.SOCK_RAW)),
            "a packet socket": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
        }


def look_around(held: Held, run_dir: Path) -> set[str]:
    """What nobody can get at of the run directory."""
    found = set()
    for file in ("journal.jsonl", "lock", "."):
        with contextlib.suppress(PermissionError):
            os.listdir(run_dir) if file == "." else (run_dir / file).read_bytes()
            found.add(file)
    with socket.socket(socket.AF_UNIX) as api, contextlib.suppress(PermissionError):
        api.connect(str(run_dir / "api.sock"))
        found.add("api.sock")
    with contextlib.suppress(PermissionError):
        os.listdir(run_dir / "xsk")
        found.add("xsk")
    return found


# The site


@dataclass
class Site:
    """A lab and its daemon."""

    lab: Lab
    daemon: Instance
    channels: Channels

    def door(self, port: str = "db1") -> Path:
        return self.daemon.paths.hand_over(port)

    def send(self, dst: str, *numbers: int) -> None:
        self.lab.wire.send(self.lab.wire_end, [test_frame(dst, WIRE_MAC, seq=number) for number in numbers])

    def taken(self, port: str = "db1", name: str = "xsks", queue: int = 0) -> bool:
        return self.channels.has_consumer(port, name, queue)

    def dropped(self) -> int:
        """Frames of db1 for which there was nobody."""
        count: int = self.channels.counters("db1")["no_consumer"]["packets"]
        return count

    def has_dropped(self, count: int) -> bool:
        return self.dropped() == count

    def log(self) -> str:
        return self.daemon.log.read_text()


def _config(lab: Lab, **db1: object) -> dict[str, Any]:
    config = config_of(lab.nic, {})
    mine = {"owner": {"user": "nobody"}, "mode": "hardware", **db1}
    config["ports"] = {
        "db1": {"switch": "ext0", "mac": DB1, "af_xdp": mine},
        "db2": {"switch": "ext0", "mac": DB2, "af_xdp": {}},
    }
    return config


@contextlib.contextmanager
def _site() -> Iterator[Site]:
    with Lab(queues=QUEUES) as lab, Instance(lab.host, _config(lab)) as daemon, Links() as links:
        daemon.directory.chmod(0o711)
        daemon.start()
        yield Site(lab, daemon, Channels(daemon.paths, links, "test"))


@pytest.fixture(scope="module")
def site(privilege: None) -> Iterator[Site]:
    """See ``Site``; what a test takes it gives back. Scope: the module."""
    with _site() as site:
        yield site


@pytest.fixture
def own_site(privilege: None) -> Iterator[Site]:
    """As ``site``, to be changed. Scope: one test."""
    with _site() as site:
        yield site


@pytest.fixture
def consumer() -> Iterator[Consumer]:
    """See ``Consumer``; it is killed at the end of the test."""
    with Consumer() as consumer:
        yield consumer


@handed_over
def test_a_consumer_without_privileges(site: Site, consumer: Consumer) -> None:
    assert consumer.do(take, site.door()) == "0000000000000000 0000000000000000"
    assert site.taken()

    site.send(DB1, *range(100))
    site.send(DB2, 7)
    site.send(BROADCAST, 100)
    assert consumer.do(receive, 101) == list(range(101))
    with site.lab.wire.capture(site.lab.wire_end) as seen:
        assert consumer.do(send, [test_frame(WIRE_MAC, DB1, seq=5)]) == 1
        (frame,) = seen.wait_for(1, wanted=lambda frame: seq_of(frame) is not None)
    assert seq_of(frame) == 5
    assert consumer.do(receive, 1, 0.2) == []
    assert (
        f"handed a copying socket of xsk0, queue 0, to uid {NOBODY.pw_uid}, pid {consumer.process.pid}"
        in (site.log())
    )


@handed_over
def test_how_full_its_rings_are_is_seen(own_site: Site, consumer: Consumer) -> None:
    """Without reading a frame, so that the RX ring fills up, and over a restart of the daemon."""
    site = own_site

    def shown() -> dict[str, Any]:
        channels: list[dict[str, Any]] = site.daemon.port("db1")["af_xdp"]["channels"]
        return next(one for one in channels if one["ifname"] == "xsk0")

    assert shown()["filled"] == {}
    consumer.do(take_only, site.door(), "xsk0", 0)
    before = shown()
    assert before["filled"] == {"rx": 0, "fill": FEW // 2, "tx": 0, "completion": 0}
    site.send(DB1, *range(5))
    wait_until(lambda: shown()["filled"]["rx"] == 5, "5 frames wait")
    assert shown()["filled"]["fill"] == FEW // 2 - 5

    site.daemon.stop(signal.SIGKILL)
    site.daemon.start()
    assert shown()["filled"]["rx"] == 5

    site.send(DB1, *range(FEW))
    wait_until(lambda: sum(shown()["lost"].values()) == 5 + FEW // 2, "what found no room is told")
    assert shown()["filled"]["rx"] == FEW // 2
    assert shown()["wants_waking"].keys() == {"fill", "tx"}
    consumer.kill()
    assert shown()["filled"] == {}


@handed_over
def test_the_tool_takes_what_is_handed_over(site: Site) -> None:
    command = [sys.executable, "-m", "offload.xsk", "dump", "--socket", str(site.door()), "--count", "10"]
    tool = subprocess.Popen([*AS_NOBODY, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert tool.stderr is not None
        assert tool.stderr.readline() == "offload.xsk: ready\n"
        site.send(DB1, *range(10))
        shown, _ = tool.communicate(timeout=10)
    finally:
        tool.kill()
        tool.wait()
    assert tool.returncode == 0
    assert [line.split()[1:4] for line in shown.splitlines()] == [[WIRE_MAC, ">", DB1]] * 10


def test_the_tool_says_why_it_gets_nothing(site: Site) -> None:
    command = [sys.executable, "-m", "offload.xsk", "echo", "--socket", str(site.door("db2"))]
    refused = subprocess.run([*AS_NOBODY, *command], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 4
    assert "It belongs to another user" in refused.stderr


@handed_over
def test_frames_are_kept_until_the_consumer_is_ready(site: Site, consumer: Consumer) -> None:
    consumer.do(take_only, site.door(), "xsk0", 0)
    site.send(DB1, *range(FEW // 2))

    consumer.do(use)
    assert consumer.do(receive, FEW // 2) == list(range(FEW // 2))


@handed_over
def test_another_ports_socket_is_closed_to_it(site: Site, consumer: Consumer) -> None:
    with pytest.raises(PrivilegeError, match="It belongs to another user"):
        consumer.do(take, site.door("db2"))
    site.door("db2").chmod(0o666)
    try:
        with pytest.raises(handed.RefusedError, match=f"db2 is not for uid {NOBODY.pw_uid}: only for root"):
            consumer.do(take, site.door("db2"))
    finally:
        site.door("db2").chmod(0o600)
    assert f"port db2 is not for uid {NOBODY.pw_uid}" in site.log()
    assert not site.taken("db2")
    assert consumer.do(look_around, site.daemon.paths.run_dir) == set()


@handed_over
def test_root_gets_any_ports(site: Site) -> None:
    with Consumer(privileged=True) as root:
        for port in "db1", "db2":
            root.do(take, site.door(port))
        site.send(DB2, 1)
        site.send(DB1, 2)
        assert sorted(root.do(receive, 2)) == [1, 2]


def test_a_privileged_consumer_binds_its_own(site: Site) -> None:
    with Consumer(privileged=True) as dpdk:
        dpdk.do(bind_own, site.door(), site.channels.namespace("db1"))
        assert site.taken()
        site.send(DB1, *range(10))
        assert dpdk.do(receive, 10) == list(range(10))


def test_a_map_can_only_be_written(site: Site) -> None:
    with handed.connect(site.door()) as provider:
        with provider.map("xsk0") as xsks, pytest.raises(OurPrivilegeError, match="could not read a map"):
            Map(xsks.fd).lookup(bytes(4), 4)
        with pytest.raises(handed.RefusedError, match="db1 is not trusted with sockets of its own on eth1"):
            provider.map("eth1")


@handed_over
def test_the_nics_queues_receive_only(site: Site, consumer: Consumer) -> None:
    for queue in range(QUEUES):
        consumer.do(take, site.door(), "eth1", queue)
    site.send(DB1, *range(50))
    site.send(BROADCAST, 99)
    assert sorted(consumer.do(receive, 50)) == list(range(50))

    with site.lab.wire.capture(site.lab.wire_end) as seen:
        assert consumer.do(try_to_send) == {
            "send": errno.ENOBUFS,
            "send bytes": errno.ENOBUFS,
            "add a TX ring": errno.EBUSY,
            "map a TX ring": errno.EINVAL,
            "another socket": errno.EPERM,
            "a packet socket": errno.EPERM,
        }
        seen.assert_silent()


@handed_over
def test_a_queue_with_an_owner(site: Site, consumer: Consumer) -> None:
    consumer.do(take, site.door(), "eth1", 1)
    with Consumer() as other:
        with pytest.raises(handed.RefusedError, match="queue 1 of eth1: Device or resource busy"):
            other.do(take, site.door(), "eth1", 1)
        with pytest.raises(handed.RefusedError, match=r"queue 9 of eth1: .*There is no such queue"):
            other.do(take, site.door(), "eth1", 9)
    assert site.taken(name="nic_sockets", queue=1)


def test_what_there_is_to_have(site: Site) -> None:
    with handed.connect(site.door()) as provider:
        xsk0, eth1 = provider.channels()
    assert (xsk0.ifname, xsk0.kind, xsk0.queues, eth1.ifname, eth1.kind, eth1.queues) == (
        *("xsk0", "software", 1),
        *("eth1", "hardware", QUEUES),
    )
    assert Path(xsk0.map_path).exists()
    assert Path(eth1.map_path).exists()
    assert xsk0.netns
    assert os.path.exists(xsk0.netns)
    assert eth1.netns is None


@handed_over
@pytest.mark.parametrize(("device", "name"), [("xsk0", "xsks"), ("eth1", "nic_sockets")])
def test_a_killed_consumer_leaves_an_empty_place(site: Site, device: str, name: str) -> None:
    for attempt in range(3):
        with Consumer() as consumer:
            consumer.do(take, site.door(), device)
            assert site.taken(name=name)
            expected = site.dropped() + 5

            consumer.kill()

            assert not site.taken(name=name), f"attempt {attempt}"
            if device == "xsk0":
                site.send(DB1, *range(5))
                wait_until(functools.partial(site.has_dropped, expected), "five frames are counted")


@handed_over
def test_a_killed_nic_consumer_gives_way_to_the_software_channel(site: Site, consumer: Consumer) -> None:
    consumer.do(take, site.door())
    consumer.do(send, [test_frame(WIRE_MAC, DB1)])  # who has not been heard is reached by the bridge
    site.daemon.wait_port("db1", state="active")
    with Consumer() as fast:
        for queue in range(QUEUES):
            fast.do(take, site.door(), "eth1", queue)
        site.send(DB1, *range(20))
        assert sorted(fast.do(receive, 20)) == list(range(20))
        fast.kill()
    site.send(DB1, *range(20, 40))
    assert consumer.do(receive, 20) == list(range(20, 40))


@handed_over
def test_a_daemon_that_restarts_interrupts_nobody(own_site: Site, consumer: Consumer) -> None:
    site = own_site
    consumer.do(take, site.door())
    site.send(DB1, *range(10))
    site.daemon.stop(signal.SIGKILL)
    site.send(DB1, *range(10, 20))
    with pytest.raises(XskError, match="Its provider does not run any more"):
        handed.connect(site.door())

    site.daemon.start()

    site.send(DB1, *range(20, 30))
    assert consumer.do(receive, 30) == list(range(30))
    consumer.kill()
    with Consumer() as restarted:
        restarted.do(take, site.door())
        site.send(DB1, 30)
        assert restarted.do(receive, 1) == [30]
    assert site.daemon.stop() == 0
    assert not any(path.is_socket() for path in site.door().parent.iterdir())


@handed_over
def test_sockets_follow_the_config(own_site: Site, consumer: Consumer) -> None:
    site = own_site
    config = _config(site.lab, trusted=True)
    config["ports"]["db2"]["af_xdp"] = {"owner": {"user": "nobody"}}
    site.daemon.cli("apply", str(site.daemon.write(config)))
    consumer.do(take, site.door("db2"))
    with handed.connect(site.door()) as provider, provider.map("eth1") as sockets:
        assert sockets.fd >= 0

    del config["ports"]["db1"]
    config["ports"]["db2"]["af_xdp"] = {}
    site.daemon.cli("apply", str(site.daemon.write(config)))

    assert {path.name for path in site.door().parent.iterdir()} == {"db2.sock", "db2.json"}
    with Consumer() as other, pytest.raises(PrivilegeError):
        other.do(take, site.door("db2"))
    site.send(DB2, 1)
    assert consumer.do(receive, 1) == [1]  # what was handed over stays


def test_a_channel_that_is_not_there(site: Site) -> None:
    supply = Supply(site.channels)
    with pytest.raises(KernelError, match="port db9 does not have that channel now"):
        supply.socket("db9", None, 0, FEW, "auto").__enter__()
    with pytest.raises(KernelError, match="port db9 does not have that channel now"):
        supply.map("db9", None).__enter__()
    with pytest.raises(KernelError, match="port db9 does not have that channel now"):
        supply.channel("db9", None)


@handed_over
def test_nothing_stays_of_what_failed(site: Site, consumer: Consumer) -> None:
    """Bound, but there is no map to put it into: the queue is free at once."""
    before = umems()
    with Links() as links:
        without_maps = Channels(replace(site.daemon.paths, pin_dir=Path("/nowhere")), links, "test")
    with pytest.raises(KernelError, match="port db1 does not have that channel now"):
        Supply(without_maps).socket("db1", None, 0, FEW, "auto").__enter__()

    assert umems() == before
    consumer.do(take, site.door())


def umems() -> list[str]:
    """The descriptors of this process that are of a UMEM's memory."""
    return [fd for fd in os.listdir("/proc/self/fd") if "umem" in _target(fd)]


def _target(fd: str) -> str:
    """What a descriptor of this process is of; nothing when it was closed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


@handed_over
def test_frames_longer_than_a_chunk(make_lab: Callable[..., Lab]) -> None:
    if not takes_frags():
        pytest.skip("this kernel's AF_XDP takes no frames of several buffers")
    lab = make_lab(mtu=9000)
    config = config_of(lab.nic, {})
    config["ports"] = {"db1": {"switch": "ext0", "mac": DB1, "af_xdp": {}}}
    with Instance(lab.host, config) as daemon:
        daemon.start()
        with (
            handed.connect(daemon.paths.hand_over("db1")) as provider,
            provider.socket("xsk0") as bound,
            Socket(bound) as consumer,
        ):
            long = test_frame(DB1, WIRE_MAC, seq=1, size=9000)
            lab.wire.send(lab.wire_end, [long])
            with consumer.receive(timeout=5) as batch:
                assert [bytes(frame) for frame in batch] == [long]
                assert len(batch.lengths) > 1
