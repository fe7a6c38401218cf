"""The hand-over's protocol over real unix sockets, with maps and sockets that are only files."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload import handover
from offload.config import parse, with_channels
from offload.errors import KernelError
from offload.handover import HandOver, Offer, offers
from offload.kernel import unix
from offload.kernel.sockets import Parcel
from offload.paths import Paths
from offload.xsk import handed
from offload.xsk.errors import XskError

ME = (os.getuid(), os.getgid())
MINE = Offer(owner=ME)
TRUSTED = Offer(owner=ME, nic="eth1", copy="zero-copy", trusted=True)


class FakeSupply:
    """Gives out pipes. ``open`` counts what has not been closed again here."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.open = 0
        self.error: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()

    def channel(self, port: str, nic: str | None) -> dict[str, Any]:
        kind = "hardware" if nic else "software"
        return {
            "ifname": nic or "xsk0",
            "kind": kind,
            "queues": 1,
            "mtu": 1500,
            "netns": None,
            "map_path": f"/{port}",
        }

    @contextlib.contextmanager
    def map(self, port: str, nic: str | None) -> Iterator[Parcel]:
        with self._parcel("map", ("map", port, nic), {}) as parcel:
            yield parcel

    @contextlib.contextmanager
    def socket(self, port: str, nic: str | None, queue: int, frames: int, copy: str) -> Iterator[Parcel]:
        with self._parcel("socket", (port, nic, queue, frames, copy), {"queue": queue}) as parcel:
            yield parcel

    @contextlib.contextmanager
    def _parcel(self, kind: str, asked: tuple[object, ...], particulars: dict[str, Any]) -> Iterator[Parcel]:
        self.asked.append(asked)
        assert self.go_on.wait(5)
        if self.error:
            raise self.error
        reader, writer = os.pipe()
        os.write(writer, kind.encode())
        self.open += 1
        try:
            yield Parcel(kind, (reader,) if kind == "map" else (reader, writer), particulars)
        finally:
            self.open -= 1
            os.close(reader)
            os.close(writer)


class Served:
    """A hand-over in a thread with a loop of its own."""

    def __init__(self, run_dir: Path, supply: FakeSupply) -> None:
        self.paths = Paths(run_dir=run_dir)
        self.supply = supply
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._hand_over = HandOver(self.paths, supply)

    def follow(self, **offers: Offer) -> None:
        self._run(lambda: self._hand_over.follow(offers))

    def lag(self) -> float:
        """Seconds until the loop gets round to something new."""
        began = time.monotonic()
        self._run(lambda: None)
        return time.monotonic() - began

    def _run(self, function: Callable[[], None]) -> None:
        async def body() -> None:
            function()

        asyncio.run_coroutine_threadsafe(body(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._hand_over.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def supply() -> FakeSupply:
    return FakeSupply()


@pytest.fixture
def served(tmp_path: Path, supply: FakeSupply) -> Iterator[Served]:
    """A hand-over for the ports ``db1`` (software) and ``db2`` (hardware, trusted). Scope: one test."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o750)
    served = Served(run_dir, supply)
    try:
        served.follow(db1=MINE, db2=TRUSTED)
        yield served
    finally:
        supply.go_on.set()
        served.stop()


class Visitor:
    """A raw connection, as DPDK makes it."""

    def __init__(self, path: Path, *, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(5)
        self.socket.connect(str(path))
        self.fds: list[int] = []
        if greet:
            assert self.ask(b"/connect,somewhere") == b"/host_ok"

    def ask(self, request: bytes, ancillary: list[tuple[int, int, bytes]] | None = None) -> bytes:
        self.socket.sendmsg([request], ancillary or [])
        return self.read()

    def read(self) -> bytes:
        answer, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
        self.fds += fds
        return answer

    def ended(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def visit(served: Served) -> Iterator[Callable[..., Visitor]]:
    """Connect to a port: ``visit("db1")``; closed at the end of the test."""
    with contextlib.ExitStack() as held:
        yield lambda port, **how: held.enter_context(Visitor(served.paths.hand_over(port), **how))


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_dpdk_gets_the_map(visit: Callable[..., Visitor], supply: FakeSupply) -> None:
    visitor = visit("db1", greet=False)

    assert visitor.ask(b"/connect,myhost") == b"/host_ok"
    assert visitor.ask(b"/version") == b"0.1"
    assert visitor.ask(b"/xsk_map_fd,xsk0") == b"/fd_ack"
    assert visitor.ask(b"/fin") == b"/fin_ack"
    assert visitor.ended()
    assert supply.asked == [("map", "db1", None)]
    assert len(visitor.fds) == 1
    assert os.read(visitor.fds[0], 10) == b"map"
    assert supply.open == 0


@pytest.mark.parametrize(
    ("port", "request_", "asked"),
    [
        ("db1", "/xsk_socket,xsk0", ("db1", None, 0, 4096, "auto")),
        ("db1", "/xsk_socket, xsk0, 0, 64", ("db1", None, 0, 64, "auto")),
        ("db2", "/xsk_socket,eth1,3", ("db2", "eth1", 3, 4096, "zero-copy")),
        ("db2", "/xsk_socket,eth1,3,16384", ("db2", "eth1", 3, 16384, "zero-copy")),
    ],
)
def test_a_socket_with_its_memory(
    port: str, request_: str, asked: tuple[object, ...], visit: Callable[..., Visitor], supply: FakeSupply
) -> None:
    visitor = visit(port)

    answer = visitor.ask(request_.encode())

    assert answer == f'/fd_ack,{{"queue": {asked[2]}}}'.encode()
    assert supply.asked == [asked]
    assert len(visitor.fds) == 2
    wait_until(lambda: supply.open == 0)


@pytest.mark.parametrize(
    ("port", "request_", "reason"),
    [
        ("db1", "/xsk_map_fd,eth1", "port db1 has xsk0 alone, without mode: hardware"),
        ("db2", "/xsk_map_fd,eth2", "port db2 has xsk0 and eth1"),
        ("db1", "/xsk_map_fd,", "port db1 has xsk0 alone"),
        ("db1", "/xsk_socket,xsk0,x", "as numbers"),
        ("db1", "/xsk_socket,xsk0,-1", "as numbers"),
        ("db1", "/xsk_socket,xsk0,99999999999", "as numbers"),
        ("db1", "/xsk_socket,xsk0,0,63", "63 frames: from 64 to 16384 can be had"),
        ("db1", "/xsk_socket,xsk0,0,16385", "16385 frames: from 64 to 16384 can be had"),
    ],
)
def test_what_cannot_be_had(
    port: str,
    request_: str,
    reason: str,
    visit: Callable[..., Visitor],
    supply: FakeSupply,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = visit(port).ask(request_.encode()).decode()

    assert answer.startswith("/fd_nak,")
    assert reason in answer
    assert reason in caplog.text
    assert f"uid {ME[0]}, pid {os.getpid()}" in caplog.text
    assert supply.asked == []


def test_the_nics_map_is_for_the_trusted(
    served: Served, visit: Callable[..., Visitor], supply: FakeSupply
) -> None:
    visitor = visit("db2")
    assert visitor.ask(b"/xsk_map_fd,eth1") == b"/fd_ack"

    served.follow(db1=MINE, db2=replace(TRUSTED, trusted=False))

    answer = visitor.ask(b"/xsk_map_fd,eth1")
    assert answer.startswith(b"/fd_nak,port db2 is not trusted with sockets of its own on eth1")
    assert visitor.ask(b"/xsk_socket,eth1").startswith(b"/fd_ack,")


def test_dpdk_notices_a_refusal(visit: Callable[..., Visitor], supply: FakeSupply) -> None:
    """It asks ``strncmp(answer, expected, strlen(expected)) < 0``, and has room for 127 bytes."""
    supply.error = KernelError("no such channel: " + "x" * 200)
    visitor = visit("db1")

    refused = visitor.ask(b"/xsk_map_fd,xsk0")
    end = visitor.ask(b"/fin")

    assert refused.startswith(b"/fd_nak,no such channel")
    assert end.startswith(b"/error,no such channel")
    assert end[:8] < b"/fin_ack"
    assert len(refused) == len(end) == 127
    assert visitor.ended()


@pytest.mark.parametrize(
    "request_",
    [
        *(b"/xsk_map_fd", b"/fd", b"\xff\xfe", b",", b"/xsk_map_fd,a\nb", b"/xsk_socket,xsk0,0,64,1"),
        pytest.param(b"/connect," + b"x" * 300, id="long"),
        pytest.param(b"x" * 100_000, id="very long"),
    ],
)
def test_nonsense_is_answered_and_forgotten(
    request_: bytes, visit: Callable[..., Visitor], supply: FakeSupply
) -> None:
    visitor = visit("db1")

    assert visitor.ask(request_) == b"/nak"
    assert visitor.ask(b"/version") == b"0.1"
    assert supply.asked == []


def test_first_comes_connect(visit: Callable[..., Visitor], supply: FakeSupply) -> None:
    visitor = visit("db1", greet=False)

    assert visitor.ask(b"/xsk_map_fd,xsk0") == b"/nak"
    assert visitor.ended()
    assert supply.asked == []


def test_busy_polling_is_refused_and_its_descriptor_closed(visit: Callable[..., Visitor]) -> None:
    reader, writer = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]).tobytes())

    answer = visit("db1").ask(b"/config_busy_poll,20,64", [rights])
    os.close(writer)

    assert answer == b"/config_busy_poll_nak"
    assert os.read(reader, 1) == b""  # nobody else can write to it
    os.close(reader)


def test_strangers_get_nothing(
    served: Served,
    visit: Callable[..., Visitor],
    supply: FakeSupply,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unix, "credentials", lambda sock: (77, ME[0] + 1))
    visitor = visit("db1", greet=False)

    answer = visitor.ask(b"/connect,myhost")

    assert answer.startswith(f"/host_nak,port db1 is not for uid {ME[0] + 1}: only for root".encode())
    assert answer[:8] < b"/host_ok"
    assert visitor.ended()
    assert "pid 77" in caplog.text
    assert supply.asked == []


def test_files_are_the_owners(served: Served) -> None:
    path = served.paths.hand_over("db1")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (path.stat().st_uid, path.stat().st_gid) == ME
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o711
    if ME != (0, 0):
        assert stat.S_IMODE(served.paths.run_dir.stat().st_mode) == 0o751


def test_root_alone_leaves_the_run_directory_closed(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    tmp_path.chmod(0o750)
    for owner, mode in ((0, 0), 0o750), ((65534, 65534), 0o751):
        unix.listen_for(tmp_path / "xsk" / "db1.sock", owner).close()
        assert stat.S_IMODE(tmp_path.stat().st_mode) == mode


def test_sockets_follow_the_ports(served: Served, supply: FakeSupply, visit: Callable[..., Visitor]) -> None:
    before = visit("db1")
    inode = served.paths.hand_over("db2").stat().st_ino
    stale = served.paths.hand_over("gone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(stale))

    served.follow(db2=replace(TRUSTED, copy="copy"), db3=MINE)

    assert before.ended()
    found = sorted(path.name for path in stale.parent.iterdir())
    assert found == ["db2.sock", "db3.sock"]
    assert served.paths.hand_over("db2").stat().st_ino == inode
    assert visit("db3").ask(b"/xsk_map_fd,xsk0") == b"/fd_ack"
    visit("db2").ask(b"/xsk_socket,eth1")
    assert supply.asked[-1] == ("db2", "eth1", 0, 4096, "copy")


def test_a_new_owner_shows_the_old_one_out(served: Served, visit: Callable[..., Visitor]) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    before = visit("db1")

    served.follow(db1=Offer(owner=(65534, 65534)), db2=TRUSTED)

    assert before.ended()
    assert served.paths.hand_over("db1").stat().st_uid == 65534


def test_a_dead_daemons_socket_is_replaced(served: Served, visit: Callable[..., Visitor]) -> None:
    path = served.paths.hand_over("db3")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))

    served.follow(db1=MINE, db2=TRUSTED, db3=MINE)

    assert visit("db3").ask(b"/version") == b"0.1"


def test_what_is_in_the_way_is_left_and_the_others_are_served(
    served: Served, visit: Callable[..., Visitor], caplog: pytest.LogCaptureFixture
) -> None:
    served.paths.hand_over("db0").mkdir()
    try:
        served.follow(db0=MINE, db1=MINE)

        assert "port db0: nothing can be handed over" in caplog.text
        assert visit("db1").ask(b"/version") == b"0.1"
    finally:
        served.paths.hand_over("db0").rmdir()


def test_who_went_away_gets_nothing_and_nothing_stays(
    served: Served, visit: Callable[..., Visitor], supply: FakeSupply
) -> None:
    supply.go_on.clear()
    visitor = visit("db1")
    visitor.socket.send(b"/xsk_socket,xsk0")
    wait_until(lambda: len(supply.asked) == 1)

    visitor.socket.close()
    supply.go_on.set()

    wait_until(lambda: supply.open == 0)
    assert visit("db1").ask(b"/xsk_socket,xsk0").startswith(b"/fd_ack")


def test_one_at_a_time_and_the_loop_goes_on(
    served: Served, visit: Callable[..., Visitor], supply: FakeSupply
) -> None:
    supply.go_on.clear()
    visitors = [visit("db1") for _ in range(8)]
    for visitor in visitors:
        visitor.socket.send(b"/xsk_socket,xsk0")
    wait_until(lambda: len(supply.asked) == 1)

    assert served.lag() < 0.5
    assert visit("db1").ask(b"/version") == b"0.1"
    other = visit("db2")
    other.socket.send(b"/xsk_map_fd,eth1")
    wait_until(lambda: len(supply.asked) == 2)  # another port's turn
    assert supply.asked[1] == ("map", "db2", "eth1")

    supply.go_on.set()
    for visitor in visitors:
        assert visitor.read().startswith(b"/fd_ack")
    assert other.read() == b"/fd_ack"


def test_the_silent_are_shown_out(
    served: Served, visit: Callable[..., Visitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PATIENCE", 0.1)
    assert visit("db1", greet=False).ended()


def test_the_talkative_are_shown_out(visit: Callable[..., Visitor]) -> None:
    visitor = visit("db1")
    for _ in range(handover.REQUESTS - 1):
        assert visitor.ask(b"/version") == b"0.1"
    assert visitor.ended()


def test_who_does_not_listen_is_shown_out(served: Served, visit: Callable[..., Visitor]) -> None:
    """Answers that nobody takes fill the socket; the daemon does not wait for room."""
    visitor = visit("db1")
    with contextlib.suppress(OSError):
        for _ in range(handover.REQUESTS):
            visitor.socket.send(b"/channels")
    assert served.lag() < 0.5
    assert visit("db1").ask(b"/version") == b"0.1"


def test_crowds_wait_outside(served: Served, visit: Callable[..., Visitor]) -> None:
    crowd = [visit("db1") for _ in range(handover.CONNECTIONS)]
    turned_away = 0
    for _ in range(1000):
        with contextlib.suppress(OSError), visit("db1", greet=False) as one_more:
            turned_away += one_more.ended()
    assert turned_away == 1000
    assert served.lag() < 0.5
    assert visit("db2").ask(b"/version") == b"0.1"

    crowd[0].socket.close()

    def again() -> bool:
        with contextlib.suppress(OSError), Visitor(served.paths.hand_over("db1"), greet=False) as visitor:
            return visitor.ask(b"/connect,x") == b"/host_ok"
        return False

    wait_until(again)


def test_no_descriptors_left(
    served: Served,
    visit: Callable[..., Visitor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever waits is let in later; the loop does not spin meanwhile."""

    def accept(self: socket.socket) -> object:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(handover, "_PAUSE", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "accept", accept)
        visitor = visit("db1", greet=False)
        time.sleep(0.3)
        assert 1 <= len(caplog.records) <= 4
        assert "port db1: cannot let a consumer in: Too many open files" in caplog.text

    assert visitor.ask(b"/connect,x") == b"/host_ok"


def test_a_bug_ends_one_connection_only(
    visit: Callable[..., Visitor], supply: FakeSupply, caplog: pytest.LogCaptureFixture
) -> None:
    supply.error = ZeroDivisionError("a bug")
    visitor = visit("db1")
    visitor.socket.send(b"/xsk_socket,xsk0")

    assert visitor.ended()
    assert "the hand-over to uid" in caplog.text
    supply.error = None
    assert visit("db1").ask(b"/xsk_socket,xsk0").startswith(b"/fd_ack")


def test_each_hand_over_is_a_line(
    visit: Callable[..., Visitor], caplog: pytest.LogCaptureFixture, supply: FakeSupply
) -> None:
    caplog.set_level("INFO")
    visit("db2").ask(b"/xsk_socket,eth1,3")
    wait_until(lambda: "handed" in caplog.text)
    assert [record.getMessage() for record in caplog.records] == [
        f"port db2: handed a socket of eth1, queue 3, to uid {ME[0]}, pid {os.getpid()}"
    ]


# The library's side


def test_the_library_asks_what_there_is(served: Served) -> None:
    with handed.connect(served.paths.hand_over("db2")) as provider:
        assert [(channel.ifname, channel.kind) for channel in provider.channels()] == [
            ("xsk0", "software"),
            ("eth1", "hardware"),
        ]


def test_the_library_gets_the_map(served: Served) -> None:
    with handed.connect(served.paths.hand_over("db1")) as provider, provider.map("xsk0") as found:
        assert os.read(found.fd, 10) == b"map"
        assert not os.get_inheritable(found.fd)


def test_the_library_raises_the_providers_reason(served: Served, supply: FakeSupply) -> None:
    supply.error = KernelError("cannot bind to queue 0 of xsk0: it is taken")
    with (
        handed.connect(served.paths.hand_over("db1")) as provider,
        pytest.raises(handed.RefusedError, match=r"^cannot bind to queue 0 of xsk0: it is taken$"),
    ):
        provider.socket("xsk0")


def test_the_library_does_not_keep_what_is_no_socket(served: Served) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with handed.connect(served.paths.hand_over("db1")) as provider:
        with pytest.raises(handed.RefusedError, match="not the particulars of an AF_XDP socket"):
            provider.socket("xsk0")
        wait_until(lambda: served.supply.open == 0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_the_library_without_a_provider(tmp_path: Path) -> None:
    with pytest.raises(XskError, match="Nobody hands anything over there"):
        handed.connect(tmp_path / "db1.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "db1.sock"))
    with pytest.raises(XskError, match="does not run any more"):
        handed.connect(tmp_path / "db1.sock")


# What a config offers


def test_offers_of_a_config() -> None:
    config = {
        "version": 1,
        "nics": {"eth1": {}, "eth2": {}},
        "switches": {
            "ext0": {"type": "external", "uplink": "eth1"},
            "ext1": {"type": "external", "uplink": "eth2"},
        },
        "ports": {
            "web1": {"switch": "ext0", "device": "web1", "mac": "02:15:5d:00:00:01"},
            "db1": {"switch": "ext0", "af_xdp": {}, "mac": "02:15:5d:00:00:02"},
            "db2": {
                "switch": "ext0",
                "mac": "02:15:5d:00:00:03",
                "af_xdp": {"mode": "hardware", "zero_copy": "require", "owner": {"user": "qemu"}},
            },
            "db3": {
                "switch": "ext1",
                "mac": "02:15:5d:00:00:04",
                "af_xdp": {"mode": "hardware", "zero_copy": "off", "trusted": True},
            },
            "db4": {"switch": "ext0", "af_xdp": {"owner": {"user": "nix"}}, "mac": "02:15:5d:00:00:05"},
        },
    }
    found = offers(with_channels(parse(json.dumps(config), "test")), {"qemu": (64055, 108), "nix": None})

    assert found == {
        "db1": Offer((0, 0), None, "auto", trusted=False),
        "db2": Offer((64055, 108), "eth1", "zero-copy", trusted=False),
        "db3": Offer((0, 0), "eth2", "copy", trusted=True),
    }
