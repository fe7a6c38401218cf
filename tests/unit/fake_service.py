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
    CapabilityView,
    ChangeView,
    ConfigStatus,
    Counters,
    Counts,
    DefaultPath,
    ExtensionView,
    HardwareQueues,
    HostView,
    NetworkView,
    NicView,
    Outcome,
    PortQueue,
    PortView,
    ProgramView,
    PythonBridgeView,
    QueueEvent,
    QueueFilter,
    QueueView,
    ReconcileStatus,
    StationView,
    StatusView,
    SwitchView,
    TakeoverView,
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
    queue_asked="auto",
    queue=PortQueue(id=1, kind="software", cpu=3, state="running"),
    af_xdp=None,
    reason=None,
    stations=[StationView(mac="02:15:5d:00:00:01", state="here", moves=1)],
    moves=1,
    counters=Counters(
        rx={
            "queue": Traffic(packets=1000, bytes=64000),
            "local": Traffic(packets=30, bytes=3000),
            "bridge": Traffic(packets=7, bytes=700),
        },
        tx={
            "local": Traffic(packets=20, bytes=2000),
            "direct": Traffic(packets=400, bytes=40000),
            "bridge": Traffic(packets=500, bytes=50000),
        },
        drops={"ring_full": 4, "spoofed": 2, "too_big": 0},
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
    queue_asked="off",
    queue=None,
    af_xdp=None,
    reason="there is no device db1",
    stations=[],
    moves=0,
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
    numa_node=0,
    rx_queues=4,
    hardware_queues=HardwareQueues(how="functions", total=7, in_use=2, why=None),
    capabilities={"sriov": CapabilityView(state="yes", why="7 virtual functions, 7 made", remedy="")},
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
        drops=6,
        drops_by_reason={"vlan": 6},
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
        drops_by_reason={"ring_full": 4, "vlan": 0},
    ),
]
HARDWARE = [
    QUEUES[0],
    QueueView(
        nic="eth1",
        id=1,
        kind="hardware",
        state="paused",
        since=MOMENT,
        cpu=3,
        device="eth1v0",
        standing=True,
        vlan_by="nic",
        ports=["web1"],
        filters=[QueueFilter(mac="02:15:5d:00:00:01", vlan=10)],
        packets=1000,
        bytes=64000,
        drops=2,
        drops_by_reason={"ring_full": 0, "stranger": 2},
        not_taken={"group": 7, "passed": 1},
    ),
    QueueView(
        nic="eth2",
        id=1,
        kind="hardware",
        state="set",
        cpu=None,
        rx_queue=3,
        standing=False,
        vlan_by="xdp",
        ports=["web2"],
        filters=[QueueFilter(mac="02:15:5d:00:00:02", vlan=10)],
        packets=0,
        bytes=0,
        drops=0,
        drops_by_reason={},
    ),
]
"""Queues as ``QUEUES``, of NICs that can sort frames themselves."""
EVENTS = [
    QueueEvent(
        time=MOMENT,
        nic="eth1",
        queue=1,
        kind="software",
        port="web1",
        before="undefined",
        after="running",
        cpu_before=None,
        cpu=2,
        why=None,
        text="web1: software queue 1 of eth1 is running, on CPU 2",
    ),
    QueueEvent(
        time=MOMENT,
        nic="eth1",
        queue=1,
        kind="software",
        port="web1",
        before="running",
        after="running",
        cpu_before=2,
        cpu=3,
        why="81 % -> 44 %",
        text="moved web1 from CPU 2 to 3: 81 % -> 44 %",
    ),
]
SWITCH = SwitchView(
    name="ext0",
    type="external",
    uplink="eth1",
    bridge="kernel",
    device="ext0",
    host="ext0-host",
    host_interface=HostView(
        interface="ext0-host",
        present=True,
        mac="02:15:5d:00:00:aa",
        vlan=10,
        addresses=["192.0.2.1/24"],
        counters=Counters(
            rx={"local": Traffic(packets=5, bytes=500), "bridge": Traffic(packets=6, bytes=600)},
            tx={"local": Traffic(packets=7, bytes=700)},
            drops={"vlan": 1},
        ),
    ),
    ports=["web1", "db1"],
    networks=[
        NetworkView(vlan=None, ports=["web1"], host=False),
        NetworkView(vlan="10", ports=["db1"], host=True),
    ],
    untagged_vid=4094,
    default_path=DefaultPath(
        from_ports=Traffic(packets=500, bytes=50000),
        from_wire=Traffic(packets=15, bytes=1500),
        to_ports=Traffic(packets=13, bytes=1300),
    ),
    python_bridge=None,
    problems=[],
)
LAB = SwitchView(
    name="lab0",
    type="private",
    uplink=None,
    bridge="python",
    device="lab0",
    host=None,
    host_interface=None,
    ports=[],
    networks=[],
    untagged_vid=None,
    default_path=DefaultPath(
        from_ports=Traffic(packets=0, bytes=0),
        from_wire=Traffic(packets=0, bytes=0),
        to_ports=Traffic(packets=0, bytes=0),
    ),
    python_bridge=PythonBridgeView(
        running=True,
        problem=None,
        frames=40,
        drops={"ring": 3},
        restarts=0,
        stations=2,
        extensions=[ExtensionView(name="mirror", state="on", reason=None, failures=0, drops=0, redirects=0)],
    ),
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
TAKEOVER = TakeoverView(nics={"eth1": ["192.0.2.1/24"]}, deadline=MOMENT, seconds_left=60.0)
CHANGES = [
    ChangeView(
        resource="Master web1", before=None, after="off-ext0", text="put web1 into the bridge off-ext0"
    ),
    ChangeView(resource="AdminUp web1", before=False, after=True, text="set web1 up"),
    ChangeView(resource="Filter eth1", before=2, after=None, text="remove the filter of db1"),
]


class FakeService:
    """Answers with the constants above and keeps what it was asked.

    ``refusal`` is raised by every method while it is set; ``changes`` is what changing methods report,
    with ``takeover`` as what waits after them. ``queue_views`` are its queues.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As if it were new."""
        self.refusal: Exception | None = None
        self.changes: list[ChangeView] = list(CHANGES)
        self.queue_views: list[QueueView] = list(QUEUES)
        self.warnings: list[str] = []
        self.takeover: TakeoverView | None = None
        self.calls: list[tuple[object, ...]] = []

    async def status(self) -> StatusView:
        self._called("status")
        return STATUS

    async def nics(self) -> list[NicView]:
        self._called("nics")
        return [NIC]

    async def switches(self) -> list[SwitchView]:
        self._called("switches")
        return [SWITCH, LAB]

    async def ports(self) -> list[PortView]:
        self._called("ports")
        return [WEB1, DB1]

    async def queues(self) -> list[QueueView]:
        self._called("queues")
        return self.queue_views

    async def events(self) -> list[QueueEvent]:
        self._called("events")
        return EVENTS

    async def apply(self, text: str, source: str, dry_run: bool, confirm_within: float) -> Outcome:
        return self._changed("apply", text, source, dry_run, confirm_within)

    async def port_add(self, name: str, spec: dict[str, JsonValue], keep: bool, dry_run: bool) -> Outcome:
        return self._changed("port_add", name, spec, keep, dry_run)

    async def port_set(self, name: str, spec: dict[str, JsonValue], dry_run: bool) -> Outcome:
        return self._changed("port_set", name, spec, dry_run)

    async def port_remove(self, name: str, dry_run: bool) -> Outcome:
        return self._changed("port_remove", name, dry_run)

    async def confirm(self) -> TakeoverView:
        self._called("confirm")
        return TAKEOVER

    async def rollback(self) -> Outcome:
        return self._changed("rollback")

    async def detach(self, everything: bool) -> Outcome:
        return self._changed("detach", everything)

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        if self.refusal is not None:
            raise self.refusal

    def _changed(self, *call: object) -> Outcome:
        self._called(*call)
        return Outcome(changes=self.changes, warnings=self.warnings, takeover=self.takeover)


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
