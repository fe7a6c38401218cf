"""A daemon's service without a kernel, and a server around it on a real unix socket."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from offload import api
from offload.errors import OffloadError
from offload.views import (
    ChangeView,
    ConfigStatus,
    Counters,
    Counts,
    NicView,
    Outcome,
    PortQueue,
    PortView,
    ProgramView,
    QueueFilter,
    QueueView,
    ReconcileStatus,
    StatusView,
    SwitchView,
    Traffic,
)

MOMENT = datetime(2024, 5, 17, 12, 30, tzinfo=UTC)

WEB1 = PortView(
    name="web1",
    switch="ext0",
    device="web1",
    mac=["02:15:5d:00:00:01"],
    vlan=None,
    weight=100,
    source="config",
    state="active",
    path="queue",
    queue=PortQueue(id=1, kind="software", cpu=3, state="running"),
    af_xdp=None,
    reason=None,
    counters=Counters(
        rx={"queue": Traffic(packets=1000, bytes=64000), "bridge": Traffic(packets=7, bytes=700)},
        tx={"bridge": Traffic(packets=500, bytes=50000)},
        drops={"ring_full": 4, "too_big": 0},
    ),
)
DB1 = PortView(
    name="db1",
    switch="ext0",
    device="db1",
    mac=["02:15:5d:00:00:02", "02:15:5d:00:00:03"],
    vlan="10",
    weight=0,
    source="keep",
    state="waiting",
    path="bridge",
    queue=None,
    af_xdp=None,
    reason="there is no device db1",
    counters=Counters(rx={}, tx={}, drops={}),
)
NIC = NicView(
    name="eth1",
    ifindex=4,
    driver="igb",
    mode_asked="native",
    mode="native",
    program=ProgramView(digest="ab" * 32, tag="0123456789abcdef", run_seconds=1.5),
    filters=1,
    default_queue={"miss": 12, "multicast": 3},
    queues_waiting=1,
    rx_dropped=0,
    problems=[],
)
QUEUES = [
    QueueView(
        nic="eth1",
        id=0,
        kind="default",
        state="running",
        cpu=None,
        ports=["db1"],
        filters=[],
        packets=15,
        bytes=1500,
        drops=0,
    ),
    QueueView(
        nic="eth1",
        id=1,
        kind="software",
        state="running",
        cpu=3,
        ports=["web1"],
        filters=[QueueFilter(mac="02:15:5d:00:00:01", vlan=0)],
        packets=1004,
        bytes=64256,
        drops=4,
    ),
]
SWITCH = SwitchView(
    name="ext0",
    type="external",
    uplink="eth1",
    bridge="kernel",
    device="off-ext0",
    host=None,
    ports=["web1", "db1"],
    problems=[],
)
STATUS = StatusView(
    version="0.1.0",
    started=MOMENT,
    pid=4711,
    config=ConfigStatus(file="/etc/offload/offload.yaml", digest="cd" * 32, loaded=MOMENT, load_error=None),
    reconcile=ReconcileStatus(runs=3, errors=0, last_seconds=0.0125, last_error=None),
    detached=False,
    counts=Counts(nics=1, switches=1, ports=2, ports_active=1, queues=1, queues_waiting=1, filters=1),
    warnings=["db1: there is no such device yet"],
)
CHANGES = [
    ChangeView(
        resource="Master web1", before=None, after="off-ext0", text="put web1 into the bridge off-ext0"
    ),
    ChangeView(resource="AdminUp web1", before=False, after=True, text="set web1 up"),
    ChangeView(resource="Filter eth1", before=2, after=None, text="remove the filter of db1"),
]


class FakeService:
    """Answers with the constants above and keeps what it was asked.

    ``refusal`` is raised by every method while it is set; ``changes`` is what changing methods report.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As if it were new."""
        self.refusal: Exception | None = None
        self.changes: list[ChangeView] = list(CHANGES)
        self.warnings: list[str] = []
        self.calls: list[tuple[object, ...]] = []

    async def status(self) -> StatusView:
        self._called("status")
        return STATUS

    async def nics(self) -> list[NicView]:
        self._called("nics")
        return [NIC]

    async def switches(self) -> list[SwitchView]:
        self._called("switches")
        return [SWITCH]

    async def ports(self) -> list[PortView]:
        self._called("ports")
        return [WEB1, DB1]

    async def queues(self) -> list[QueueView]:
        self._called("queues")
        return QUEUES

    async def apply(self, text: str, source: str, dry_run: bool) -> Outcome:
        return self._changed("apply", text, source, dry_run)

    async def port_add(self, name: str, spec: dict[str, JsonValue], keep: bool, dry_run: bool) -> Outcome:
        return self._changed("port_add", name, spec, keep, dry_run)

    async def port_set(self, name: str, spec: dict[str, JsonValue], dry_run: bool) -> Outcome:
        return self._changed("port_set", name, spec, dry_run)

    async def port_remove(self, name: str, dry_run: bool) -> Outcome:
        return self._changed("port_remove", name, dry_run)

    async def detach(self, everything: bool) -> Outcome:
        return self._changed("detach", everything)

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        if self.refusal is not None:
            raise self.refusal

    def _changed(self, *call: object) -> Outcome:
        self._called(*call)
        return Outcome(changes=self.changes, warnings=self.warnings)


@contextmanager
def served(service: api.Service, socket_path: Path) -> Iterator[api.ApiServer]:
    """``service`` behind a real server on ``socket_path``, in a thread of its own."""
    server = api.serve(api.build(service), socket_path)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),))
    thread.start()
    try:
        wait_until(lambda: server.started, "the server answers")
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def leaked_sockets() -> Iterator[None]:
    """httpcore leaves a socket that cannot connect to the garbage collector; it is collected in here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 5.0) -> None:
    """Poll ``reached()`` until it is true."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise OffloadError(f"not within {seconds} s: {what}")
        time.sleep(0.005)
