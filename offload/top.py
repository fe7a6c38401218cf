"""What ``offload top`` shows: the counters and the CPUs at two moments, and the rates between them."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from .client import NoDaemonError
from .kernel.cpus import Ticks, cpu_ticks, part_of
from .views import (
    CounterPath,
    CpuShare,
    PortRates,
    PortView,
    QueueRates,
    QueueView,
    Rate,
    TopView,
    Traffic,
)

Order = Literal["rate", "bytes", "drops", "name"]


class Source(Protocol):
    """The daemon, as ``Client`` is."""

    def ports(self) -> list[PortView]: ...

    def queues(self) -> list[QueueView]: ...


@dataclass(frozen=True)
class Look:
    """Everything at one moment: ``at`` seconds of a clock that nobody sets."""

    at: float
    ports: Mapping[str, PortView]
    queues: Mapping[tuple[str, int], QueueView]
    cpus: Mapping[int, Ticks]


def look(source: Source) -> Look:
    """One look at everything."""
    ports = {view.name: view for view in source.ports()}
    queues = {(view.nic, view.id): view for view in source.queues()}
    return Look(time.monotonic(), ports, queues, cpu_ticks())


def between(before: Look, after: Look, names: Collection[str] = ()) -> TopView:
    """The rates from one look to the next. ``names``: only these ports, and the queues that serve them.

    What was not there before, or began to count anew, is taken to have begun at 0.
    """
    seconds = max(after.at - before.at, 1e-9)
    queues = [
        _queue(before.queues.get(key), queue, seconds)
        for key, queue in after.queues.items()
        if not names or not set(names).isdisjoint(queue.ports)
    ]
    serving: dict[int, list[str]] = {}
    for queue in after.queues.values():
        if queue.cpu is not None:
            serving.setdefault(queue.cpu, []).append(f"{queue.nic}/{queue.id}")
    return TopView(
        seconds=seconds,
        ports=[
            _port(before.ports.get(name), port, seconds)
            for name, port in after.ports.items()
            if not names or name in names
        ],
        queues=queues,
        cpus=[
            _cpu(cpu, after.cpus[cpu].since(before.cpus[cpu]), serving.get(cpu, []))
            for cpu in sorted(after.cpus.keys() & before.cpus.keys())
        ],
    )


def ordered(view: TopView, by: Order) -> TopView:
    """``view`` with what is largest first; equals stay as they were."""

    def port(one: PortRates) -> float:
        if by == "drops":
            return sum(one.drops.values())
        return sum(_size(rate, by) for rate in (*one.rx.values(), *one.tx.values()))

    def queue(one: QueueRates) -> float:
        return sum(one.drops.values()) if by == "drops" else _size(one.rate, by)

    if by == "name":
        ports = sorted(view.ports, key=lambda one: one.name)
        return view.model_copy(update={"ports": ports})
    return view.model_copy(
        update={
            "ports": sorted(view.ports, key=port, reverse=True),
            "queues": sorted(view.queues, key=queue, reverse=True),
        }
    )


def follow(
    source: Source, names: Collection[str], wait: Callable[[], bool], *, patient: bool = False
) -> Iterator[TopView | NoDaemonError]:
    """A view of each while, as long as ``wait``, which takes that long, says so.

    ``patient``: when the daemon does not answer any more, say so and try again. Otherwise NoDaemonError.
    """
    before: Look | None = look(source)
    while wait():
        try:
            now = look(source)
        except NoDaemonError as error:
            if not patient:
                raise
            before = None
            yield error
            continue
        if before:
            yield between(before, now, names)
        before = now


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """A way to wait so many seconds, on a terminal less if q is pressed: says whether to go on."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> bool:
            time.sleep(seconds)
            return True

        yield sleep
        return
    terminal = sys.stdin.fileno()
    kept = termios.tcgetattr(terminal)

    def wait(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0] and sys.stdin.read(1) in ("q", "Q", ""):
                return False
        return True

    try:
        tty.setcbreak(terminal)
        yield wait
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, kept)


def _port(before: PortView | None, now: PortView, seconds: float) -> PortRates:
    then = before.counters if before else None
    return PortRates(
        name=now.name,
        switch=now.switch,
        state=now.state,
        path=now.path,
        queue=now.queue.id if now.queue else None,
        cpu=now.queue.cpu if now.queue else None,
        rx=_paths(then.rx if then else {}, now.counters.rx, seconds),
        tx=_paths(then.tx if then else {}, now.counters.tx, seconds),
        drops=_drops(then.drops if then else {}, now.counters.drops, seconds),
    )


def _queue(before: QueueView | None, now: QueueView, seconds: float) -> QueueRates:
    return QueueRates(
        nic=now.nic,
        id=now.id,
        kind=now.kind,
        state=now.state,
        cpu=now.cpu,
        ports=now.ports,
        rate=Rate(
            packets=_grown(before.packets if before else 0, now.packets) / seconds,
            bytes=_grown(before.bytes if before else 0, now.bytes) / seconds,
        ),
        drops=_drops(before.drops_by_reason if before else {}, now.drops_by_reason, seconds),
    )


def _cpu(cpu: int, ticks: Ticks, queues: list[str]) -> CpuShare:
    return CpuShare(
        cpu=cpu,
        busy=part_of(ticks.busy, ticks.all),
        softirq=part_of(ticks.softirq, ticks.all),
        queues=queues,
    )


def _paths(
    before: Mapping[CounterPath, Traffic], now: Mapping[CounterPath, Traffic], seconds: float
) -> dict[CounterPath, Rate]:
    none = Traffic(packets=0, bytes=0)
    return {
        path: Rate(
            packets=_grown(before.get(path, none).packets, traffic.packets) / seconds,
            bytes=_grown(before.get(path, none).bytes, traffic.bytes) / seconds,
        )
        for path, traffic in now.items()
    }


def _drops(before: Mapping[str, int], now: Mapping[str, int], seconds: float) -> dict[str, float]:
    grown = {reason: _grown(before.get(reason, 0), count) for reason, count in now.items()}
    return {reason: count / seconds for reason, count in grown.items() if count}


def _grown(before: int, now: int) -> int:
    return now - before if now >= before else now


def _size(rate: Rate, by: Order) -> float:
    return rate.bytes if by == "bytes" else rate.packets
