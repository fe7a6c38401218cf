"""The daemon: holds a config, keeps the kernel like it, answers the API and Prometheus.

A config change walks ``API -> _adopt -> Reconciler.apply -> kernel``; a device that
comes or goes walks ``netlink -> _watch -> Reconciler.apply``. Both run on the one
kernel thread, so nothing ever changes the kernel twice at a time. When the daemon
ends, however it ends, frames keep flowing as they did.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import itertools
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from . import __version__, api, lifecycle, portfiles, report, takeover, takeovers
from .bridge.chain import installed
from .config import Config, differing, merge_ports, parse, parse_port, warnings, with_channels
from .delivery import Choice
from .describe import describe
from .document import dotted
from .errors import ConfigError, OffloadError, Problem, UsageError
from .handover import HandOver, offers
from .journal import Era, Journal
from .kernel import bypassed, host
from .kernel.bypassed import Place
from .kernel.counters import Meter
from .kernel.flows import Flows
from .kernel.heard import heard
from .kernel.links import LinkEvents
from .kernel.load import Sampler
from .kernel.service import alone, notify
from .kernel.sockets import Supply
from .kernel.system import System
from .kernel.watchdog import watch
from .macs import MacAllocator, resolve_auto
from .metrics import Durations, MetricsServer, Scrape, register, serve_metrics
from .model import Carried, Change
from .paths import Paths
from .portfiles import PortFile
from .rebalance import Balance, Move, Stuck
from .reconcile import Reconciler, Result
from .views import (
    ConfigStatus,
    NicView,
    Outcome,
    PortView,
    QueueEvent,
    QueueView,
    ReconcileStatus,
    StatusView,
    SwitchView,
    TakeoverView,
)

log = logging.getLogger(__name__)

_TICK = 1.0
"""Seconds between two ticks, and so the length of a sample of load."""
_LOOK_EVERY = 3
"""Ticks between two looks at what others may have changed."""
_WHOLE_EVERY = 60.0
"""Seconds between two looks at everything, at least."""
_WHOLE_SHARE = 0.0003
"""Of the time, these looks take at most."""
_M_ARENA_MAX = -8
"""From glibc's malloc.h."""
_NEW_OBJECTS = 10_000
"""So many more objects than before make Python look for garbage."""

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A config as it came, and as it is meant: with the ports of files, and every MAC known.

    ``base`` is what the text says, without the ports of files. ``asked`` still says ``auto`` where a MAC is
    drawn from the range. ``heard`` are addresses on the network that were not drawn therefore.
    """

    text: str
    source: str
    base: Config
    files: Mapping[str, PortFile]
    asked: Config
    config: Config
    heard: frozenset[str] = frozenset()

    @property
    def automatic(self) -> set[str]:
        """The ports that have their MAC from the range."""
        if self.asked.mac_range is None:
            return set()
        return {name for name, port in self.asked.ports.items() if port.mac == "auto"}


def understand(
    text: str, source: str, files: Mapping[str, PortFile], paths: Paths, known: Wanted | None = None
) -> Wanted:
    """Read a config. Raises ``ConfigError`` with everything that is wrong.

    What it draws from the range of MACs is written down when the config is in force. The text of ``known``
    is not read again.
    """
    same = known and (known.text, known.source) == (text, source)
    base = known.base if known and same else parse(text, source)
    extra = {name: file.port for name, file in files.items()}
    asked = merge_ports(base, extra, source, known.asked if known else None)
    _require_extensions(asked, source)
    allocator = _macs(asked, paths)
    on_network: frozenset[str] = frozenset()
    config = asked
    if allocator:
        on_network = heard(asked.switches, paths.run_dir)
        config = resolve_auto(asked, allocator, on_network, keep=False)
    own = {name: file for name, file in files.items() if name not in base.ports}
    return Wanted(text, source, base, own, asked, with_channels(config), on_network)


def _require_extensions(config: Config, source: str) -> None:
    """Raises ConfigError for extensions of Python bridges that no package brings."""
    known = installed() if any(switch.extensions for switch in config.switches.values()) else []
    problems = [
        Problem(
            dotted(("switches", name, "extensions", index, "name")),
            extension.name,
            f"must be the name of an extension that is installed: {', '.join(known) or 'there is none'}",
        )
        for name, switch in config.switches.items()
        for index, extension in enumerate(switch.extensions)
        if extension.name not in known
    ]
    if problems:
        raise ConfigError(problems, source)


def _macs(config: Config, paths: Paths) -> MacAllocator | None:
    """Who draws from the config's range of MACs, if it has one."""
    if config.mac_range is None:
        return None
    return MacAllocator(paths.state_dir / "macs.json", config.mac_range.first, config.mac_range.last)


def read_config(file: Path) -> str:
    """The text of a config file; the error names it."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"could not read {file}: {error}") from error


def era() -> Era:
    """This boot and network namespace."""
    return Era(host.boot_id(), host.netns_inode())


def outcome(
    changes: tuple[Change, ...],
    config: Config | None,
    ports: Mapping[str, Place] | None = None,
    network: takeover.HostNetwork | None = None,
) -> Outcome:
    """What was changed, what ``config`` asks in vain, and what frames of ``ports`` pass by from now on.

    ``network`` is what the host has on uplinks, for what there is to know of addresses that move.
    """
    told = warnings(config) if config else []
    if config and network:
        told += takeover.all_warnings(config, network)
    return Outcome(
        changes=[describe(change) for change in changes],
        warnings=[*told, *bypassed.warnings(ports)] if ports else told,
    )


def run(config_file: Path, paths: Paths) -> int:
    """``offload run``: returns the exit code when a signal ends it. Raises on a bad start."""
    # systemd's journal has its own time stamps.
    form = (
        "%(levelname)s %(message)s"
        if "JOURNAL_STREAM" in os.environ
        else "%(asctime)s %(levelname)s %(message)s"
    )
    logging.basicConfig(level=logging.INFO, format=form)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    _use_one_heap()
    with alone(paths.run_dir):
        wanted = understand(read_config(config_file), str(config_file), portfiles.load(paths), paths)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kernel") as thread:
            system = thread.submit(lambda: System(paths).__enter__()).result()
            try:
                daemon = Daemon(paths, system, thread)
                asyncio.run(daemon.main(wanted))
            finally:
                thread.submit(system.__exit__, None, None, None).result()
    return 0


class Daemon:
    """Implements ``api.Service`` and ``metrics.Source`` over a ``System``."""

    def __init__(self, paths: Paths, system: System, thread: ThreadPoolExecutor) -> None:
        self._paths = paths
        self._system = system
        self._thread = thread
        self._journal = Journal(paths.journal, era())
        self._reconciler = Reconciler(system, self._journal)
        self._meter = Meter(system)
        self._hand_over = HandOver(paths, Supply(system.channels))
        self._life = lifecycle.Life()
        self._busy = False
        self._started = datetime.now(UTC)
        self._loaded = self._started
        self._load_error: str | None = None
        self._detached = False
        self._durations = Durations()
        self._errors = 0
        self._last_seconds: float | None = None
        self._next_whole = 0.0
        self._last_error: str | None = None
        self._changing = asyncio.Lock()
        self._news = asyncio.Event()
        self._changed: set[str] = set()  # devices; "" for whatever else
        self._heard: set[int] = set()  # ports by id
        self._events: LinkEvents | None = None
        self._ready = False
        self._metrics: MetricsServer | None = None
        self._listening: str | None = None
        self._end = asyncio.Event()
        self._sampler = Sampler(system.dataplane)
        self._balances: Mapping[str, Balance] = {}
        self._flows = Flows(system.dataplane, system.links)
        self._choices: Mapping[str, Choice] = {}
        self._seen: tuple[tuple[int, ...], Hashable] | None = None
        self._pending: takeovers.Pending | None = None
        self._clock: asyncio.Task[None] | None = None
        self._wanted: Wanted
        self._result: Result

    async def main(self, wanted: Wanted) -> None:
        """Put ``wanted`` in force and serve until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        # Addresses are taken first: one that cannot be had refuses the start while nothing is changed.
        server = api.serve(api.build(self), self._paths.socket)
        try:
            self._metrics = self._serve_metrics(wanted.config)
            with self._system.events() as events:
                self._events = events
                loop.add_reader(events.fileno(), self._hear)
                news = self._system.dataplane.news_fd()
                loop.add_reader(news, self._hear_stations)
                self._wanted = await self._begin(wanted)
                self._keep_macs(wanted)
                self._ready = True
                _spare_the_collector()
                notify(f"READY=1\nSTATUS={len(wanted.config.ports)} ports")
                log.info("ready: %s", self._paths.socket)
                await self._until_end(server)
                await self._end_pending()
                loop.remove_reader(events.fileno())
                loop.remove_reader(news)
        finally:
            server.close()
            await self._hand_over.close()
            if self._metrics:
                await asyncio.to_thread(self._metrics.stop)

    async def _until_end(self, server: api.ApiServer) -> None:
        """Serve and watch until a signal or ``detach --all``, or until one of the two fails."""
        serving = asyncio.create_task(server.serve())
        watching = asyncio.create_task(self._watch())
        ticking = asyncio.create_task(self._tick_on())
        ending = asyncio.create_task(self._end.wait())
        await asyncio.wait([serving, watching, ticking, ending], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        server.stop()
        for task in (watching, ticking, ending):
            task.cancel()
        await serving

    async def _move_metrics(self, config: Config) -> None:
        """Serve metrics where ``config`` says; an address that cannot be had leaves none served."""
        listen = config.metrics and config.metrics.listen
        if listen == self._listening:
            return
        if self._metrics:
            await asyncio.to_thread(self._metrics.stop)
            self._metrics = None
        self._metrics = self._serve_metrics(config)

    def _serve_metrics(self, config: Config) -> MetricsServer | None:
        self._listening = None
        if config.metrics is None:
            return None
        registry = CollectorRegistry()
        register(self, registry)
        server = serve_metrics(config.metrics.listen, registry)
        self._listening = config.metrics.listen
        return server

    # The kernel thread

    async def _on_kernel_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _reconcile(
        self,
        config: Config,
        *,
        strict: bool,
        failed: Mapping[str, str] | None = None,
        moves: Collection[Move] = (),
        merging: Mapping[str, bool] | None = None,
        news: Collection[str] = (),
        may_take: bool = True,
    ) -> Result:
        """One reconciliation, timed and counted. ``news``: devices that changed, "" for whatever else."""
        began = time.monotonic()
        detached, whole = self._detached, True
        self._hear()
        heard = {*news, *self._changed}

        def apply() -> Result:
            moved = {move.port: move.target for move in moves}
            few = None if "" in heard or self._seen is None else heard
            before = self._seen if few is not None else self._surroundings()
            result = self._reconciler.apply(
                config,
                strict=strict,
                detached=detached,
                failed=failed,
                moved=moved,
                merging=merging,
                news=few,
                may_take=may_take,
            )
            # What others do meanwhile is news, what we did ourselves is not.
            self._seen = self._surroundings() if result.ports is None and result.changes else before
            return result

        try:
            result = await self._on_kernel_thread(apply)
        except OffloadError as error:
            self._errors += 1
            self._last_error = str(error)
            raise
        else:
            self._last_error, whole = None, result.ports is None
            self._hand_over.follow(offers(config, result.facts.af_xdp.users))
            why = {move.port: move.why for move in moves}
            self._follow_queues(result, why)
            return result
        finally:
            self._last_seconds = time.monotonic() - began
            self._durations = self._durations.observed(self._last_seconds)
            if whole:
                self._next_whole = began + max(_WHOLE_EVERY, self._last_seconds / _WHOLE_SHARE)

    def _follow_queues(self, result: Result, why: Mapping[str, str]) -> None:
        """Tell what happened to VM queues; ``why`` has reasons by port. What was adopted is no news."""
        now = lifecycle.standings(result.desired, result.ports)
        for event in self._life.follow(now, datetime.now(UTC), why, result.ports):
            if result.changes or event.why != lifecycle.FOUND:
                log.info("%s", event.text)

    # Takeovers, which wait for their confirmation

    async def _begin(self, wanted: Wanted) -> Wanted:
        """Put the first config in force; returns what of it is. A takeover may wait since before."""
        pending = takeovers.load_pending(self._paths.pending, host.boot_id())
        if pending and pending.left() > 0:
            waiting = pending
            await self._on_kernel_thread(lambda: watch(waiting.token, self._paths))
            self._pending = pending
        elif pending:
            log.warning("%s: not confirmed in time, so it is left out", _named(pending))
            wanted = _without(wanted, pending.nics)
        try:
            self._result = await self._put_in_force(wanted.config, None, takeovers.DEFAULT_WITHIN)
        except OffloadError:
            if pending and not self._pending:
                await self._take_everything_out(wanted.config)
            raise
        if pending and not self._holds(pending):
            self._forget_pending()
        elif self._pending:
            self._await_confirmation(self._pending)
        return wanted

    async def _put_in_force(
        self, config: Config, former: Callable[[], takeovers.Former] | None, within: float
    ) -> Result:
        """Reconcile. A takeover that nobody confirmed is on record, and watched, before anything moves."""
        pending = await self._on_kernel_thread(lambda: self._prepare(config, former, within))
        try:
            result = await self._reconcile(config, strict=True, news={""})
        except BaseException:
            if pending and self._holds(pending):
                self._await_confirmation(pending)
            elif pending:
                self._forget_pending()
            raise
        if pending:
            self._await_confirmation(pending if self._pending else pending.until(within))
        return result

    def _prepare(
        self, config: Config, former: Callable[[], takeovers.Former] | None, within: float
    ) -> takeovers.Pending | None:
        """What ``config`` takes over that has to be confirmed, written down and watched."""
        if not any(switch.host and switch.uplink for switch in config.switches.values()):
            return None
        planned = self._reconciler.plan(config)
        nics = takeovers.taken(planned.facts.host, takeover.taking(planned.changes))
        if not nics:
            return None
        if self._pending:  # it is watched already
            pending = replace(self._pending, nics={**self._pending.nics, **nics})
            takeovers.save_pending(self._paths.pending, pending)
            return pending
        before = former() if former else None
        pending = takeovers.Pending(host.boot_id(), takeovers.now() + within, nics, before)
        takeovers.save_pending(self._paths.pending, pending)
        try:
            watch(pending.token, self._paths)
        except BaseException:
            takeovers.clear_pending(self._paths.pending)
            raise
        return pending

    def _holds(self, pending: takeovers.Pending) -> bool:
        """Whether addresses are away from their NICs."""
        return any(
            isinstance(resource, Carried) and resource.device in pending.nics
            for resource in self._journal.originals()
        )

    def _await_confirmation(self, pending: takeovers.Pending) -> None:
        takeovers.save_pending(self._paths.pending, pending)
        log.warning("%s: goes back in %.0f s unless it is confirmed", _named(pending), pending.left())
        self._pending = pending
        self._stop_clock()
        self._clock = asyncio.create_task(self._run_out(pending))

    async def _run_out(self, pending: takeovers.Pending) -> None:
        while (left := pending.left()) > 0:
            await asyncio.sleep(min(left, 1.0))  # the loop's own clock stands still in suspend
        async with self._changing:
            if self._pending is pending:
                log.warning("%s: not confirmed in time", _named(pending))
                await self._roll_back(pending)

    async def _roll_back(self, pending: takeovers.Pending) -> Outcome:
        """Back to what was before; the caller holds the lock. If that fails, everything of ours goes."""
        was_detached = self._detached
        try:
            wanted = await asyncio.to_thread(self._before, pending)
            self._detached = pending.former.detached if pending.former else False
            result = await self._reconcile(wanted.config, strict=False)
        except Exception:
            log.exception("%s: what was before cannot be had, so everything is taken out", _named(pending))
            self._detached = was_detached
            return await self._take_everything_out(self._wanted.config)
        self._forget_pending()
        await self._move_metrics(wanted.config)
        portfiles.save(self._paths, self._wanted.files, wanted.files)
        self._wanted, self._result, self._loaded = wanted, result, datetime.now(UTC)
        self._load_error = f"{_named(pending)}: taken back, because it was not confirmed"
        return outcome(result.changes, None)

    def _before(self, pending: takeovers.Pending) -> Wanted:
        former = pending.former
        if former is None:
            return _without(self._wanted, pending.nics)
        return understand(former.text, former.source, former.files(), self._paths)

    async def _end_pending(self) -> None:
        """What nobody has confirmed does not outlast the daemon."""
        async with self._changing:
            if self._pending:
                log.warning("%s: not confirmed before the end", _named(self._pending))
                await self._roll_back(self._pending)

    def _require_pending(self) -> takeovers.Pending:
        if self._pending is None:
            raise UsageError("no takeover waits for a confirmation: `offload status` shows one that does")
        return self._pending

    def _forget_pending(self) -> None:
        self._pending = None
        takeovers.clear_pending(self._paths.pending)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    # Devices that come, go and change

    def _hear(self) -> None:
        if self._events and (heard := self._events.drain()):
            self._changed |= {event.name for event in heard}
            self._news.set()

    def _hear_stations(self) -> None:
        """The programs have seen an address for the first time, or in another place than before."""
        for news in self._system.dataplane.drain_news():
            where = "at its port" if news.state == "here" else "from the wire"
            log.info("%s, %s, heard %s", news.mac, f"VLAN {news.vid}" if news.vid else "untagged", where)
            self._heard.add(news.port)
        self._news.set()

    def _take_news(self) -> set[str]:
        """The devices that there was news of since the last call, "" for whatever else."""
        names = {port.port_id: name for name, port in self._result.desired.ports.items()}
        heard = {names.get(port_id, "") for port_id in self._heard}
        ports = self._wanted.config.ports
        changed = self._changed | {(ports[name].device if name in ports else None) or "" for name in heard}
        self._changed, self._heard = set(), set()
        return changed

    async def _watch(self) -> None:
        """Reconcile whenever there was news, once for all that came meanwhile."""
        while True:
            await self._news.wait()
            self._news.clear()
            async with self._changing:
                changed = self._take_news()
                ports = self._wanted.config.ports
                failed = {
                    name: why
                    for name, why in self._result.failed.items()
                    if name in ports and ports[name].device not in changed
                }
                try:
                    self._result = await self._reconcile(
                        self._wanted.config, strict=False, failed=failed, news=changed
                    )
                except OffloadError as error:
                    log.error("reconciliation failed: %s", error)
                except Exception:
                    log.exception("reconciliation failed")
            # An address that two places claim flips with every frame: that shall not take all the time.
            await asyncio.sleep(self._last_seconds or 0)

    # What no netlink message tells of, looked at as time goes by

    async def _tick_on(self) -> None:
        """Tick each second, as long as the daemon runs; the same trouble is told once."""
        told = ""
        for number in itertools.count(1):
            await asyncio.sleep(_TICK)
            async with self._changing:
                trouble = ""
                try:
                    looks = number % _LOOK_EVERY == 0
                    await self._rebalance()
                    if looks or self._busy:
                        self._busy = await self._choose_deliveries()
                    if looks:
                        await self._look_around()
                except OffloadError as error:
                    trouble = str(error)
                except Exception:  # noqa: BLE001  # told below, once
                    trouble = traceback.format_exc()
                if trouble not in ("", told):
                    log.error("looking after the queues failed: %s", trouble)
                told = trouble

    async def _look_around(self) -> None:
        """Reconcile when CPUs have come or gone, or somebody has changed what we set on a NIC.

        Now and then in any case: there are changes that the kernel tells nobody.
        """
        now = await self._on_kernel_thread(self._surroundings)
        if now != self._seen or time.monotonic() > self._next_whole:
            self._seen = now
            self._changed.add("")
            self._news.set()

    def _surroundings(self) -> tuple[tuple[int, ...], Hashable]:
        return host.online_cpus(), self._system.hardware_fingerprint()

    async def _rebalance(self) -> None:
        """Take a sample of every NIC that asks for it, and move at most one queue."""
        config, desired = self._wanted.config, self._result.desired
        links = self._result.facts.links
        nics = {
            name: links[name].ifindex
            for name, nic in config.nics.items()
            if nic.queues.rebalance and name in links and not self._detached
        }
        self._balances = {name: self._balances.get(name, Balance()) for name in nics}
        if not nics:
            self._sampler.forget()
            return
        ports = tuple(desired.ports.values())
        samples = await self._on_kernel_thread(lambda: self._sampler.sample(ports, nics))
        pinned = {name for name, port in config.ports.items() if port.cpu != "auto"}
        for nic, sample in samples.items():
            cpus = config.nics[nic].queues.cpus or self._result.facts.online_cpus
            match self._balances[nic].judge(sample, cpus, pinned):
                case Stuck() as stuck:
                    log.warning("%s: %s", nic, stuck)
                case Move() as move:
                    failed = self._result.failed
                    self._result = await self._reconcile(config, strict=False, failed=failed, moves=[move])
                    return  # another NIC's decision shall rest on samples that know of this

    async def _choose_deliveries(self) -> bool:
        """Let TCP of ports with ``delivery: auto`` be merged, or not any more, by what has come for them.

        Whether enough has come to look again at the next tick.
        """
        config, links = self._wanted.config, self._result.facts.links
        nics = {name: links[name].ifindex for name in config.nics if name in links}
        busy = await self._on_kernel_thread(lambda: self._flows.busy(nics))
        if not busy:
            return False
        ports = {
            name: decision
            for name, decision in self._result.desired.ports.items()
            if decision.nic in busy and decision.adapts
        }
        if not ports:
            return False
        samples = await self._on_kernel_thread(lambda: self._flows.sample(ports.values()))
        self._choices = {name: self._choices.get(name, Choice()) for name in self._result.desired.ports}
        now = time.monotonic()
        merging = {}
        for name, sample in samples.items():
            chosen = self._choices[name].judge(sample, ports[name].delivery == "tcp", now)
            if chosen is not None:
                merging[name] = chosen
        if not merging:
            return True
        self._result = await self._reconcile(
            config, strict=False, failed=self._result.failed, merging=merging
        )
        for name in merging:
            way = self._result.desired.ports[name].delivery
            log.info("%s: delivery %s: %s", name, way, self._choices[name].why)
        return True

    # api.Service

    async def status(self) -> StatusView:
        views = await self._views()
        wanted = self._wanted
        return StatusView(
            version=__version__,
            started=self._started,
            pid=os.getpid(),
            config=ConfigStatus(
                file=wanted.source,
                digest=hashlib.sha256(wanted.text.encode()).hexdigest(),
                loaded=self._loaded,
                load_error=self._load_error,
            ),
            reconcile=ReconcileStatus(
                runs=sum(self._durations.counts),
                errors=self._errors,
                last_seconds=self._last_seconds,
                last_error=self._last_error,
            ),
            detached=self._detached,
            takeover=_view(self._pending) if self._pending else None,
            counts=views.counts(),
            warnings=[
                *warnings(wanted.config),
                *(p for nic in views.nics for p in nic.problems),
                *report.heard_elsewhere(views),
            ],
        )

    async def nics(self) -> list[NicView]:
        return (await self._views()).nics

    async def switches(self) -> list[SwitchView]:
        return (await self._views()).switches

    async def ports(self) -> list[PortView]:
        return (await self._views()).ports

    async def queues(self) -> list[QueueView]:
        return (await self._views()).queues

    async def events(self) -> list[QueueEvent]:
        return self._life.events

    async def apply(
        self, text: str, source: str, dry_run: bool, confirm_within: float = takeovers.DEFAULT_WITHIN
    ) -> Outcome:
        async with self._changing:
            try:
                return await self._adopt(text, source, self._files(), dry_run, confirm_within)
            except OffloadError as error:
                if not dry_run:
                    self._load_error = str(error)
                raise

    async def port_add(self, name: str, spec: dict[str, JsonValue], keep: bool, dry_run: bool) -> Outcome:
        async with self._changing:
            if name in self._wanted.config.ports:
                raise UsageError(f"port {name} exists already: `offload port set {name} …` changes it")
            port = parse_port(name, _without_nulls(spec), "port add")
            files = {**self._files(), name: PortFile("keep" if keep else "run", port)}
            return await self._adopt(self._wanted.text, self._wanted.source, files, dry_run)

    async def port_set(self, name: str, spec: dict[str, JsonValue], dry_run: bool) -> Outcome:
        async with self._changing:
            file = self._port_file(name)
            before = file.port.model_dump(mode="json", exclude_unset=True)
            port = parse_port(name, _without_nulls(_changed(before, spec)), "port set")
            files = {**self._files(), name: replace(file, port=port)}
            return await self._adopt(self._wanted.text, self._wanted.source, files, dry_run)

    async def port_remove(self, name: str, dry_run: bool) -> Outcome:
        async with self._changing:
            self._port_file(name)
            files = {other: file for other, file in self._files().items() if other != name}
            return await self._adopt(self._wanted.text, self._wanted.source, files, dry_run)

    async def confirm(self) -> TakeoverView:
        async with self._changing:
            pending = self._require_pending()
            takeovers.confirm(self._paths.takeovers, pending)
            self._forget_pending()
            log.info("%s: confirmed", _named(pending))
            return _view(pending)

    async def rollback(self) -> Outcome:
        async with self._changing:
            return await self._roll_back(self._require_pending())

    async def detach(self, everything: bool) -> Outcome:
        async with self._changing:
            if everything:
                return await self._take_everything_out(self._wanted.config)
            self._detached = True
            self._result = await self._reconcile(self._wanted.config, strict=False)
            return outcome(self._result.changes, None)

    async def _take_everything_out(self, config: Config) -> Outcome:
        """Leave nothing of ours, and end; the caller holds the lock. ``config`` says where to look."""
        changes = await self._on_kernel_thread(lambda: self._reconciler.take_out(config, everything=True))
        await self._on_kernel_thread(self._system.dataplane.remove_everything)
        for event in self._life.follow({}, datetime.now(UTC)):
            log.info("%s", event.text)
        self._forget_pending()
        self._end.set()
        return outcome(changes, None)

    def _files(self) -> Mapping[str, PortFile]:
        return self._wanted.files

    def _port_file(self, name: str) -> PortFile:
        if name in self._wanted.files:
            return self._wanted.files[name]
        if name in self._wanted.config.ports:
            raise UsageError(
                f"port {name} is of the config file {self._wanted.source}: "
                f"change it there, then `offload apply {self._wanted.source}`"
            )
        raise UsageError(f"there is no port {name}: `offload ports` lists them")

    async def _adopt(
        self,
        text: str,
        source: str,
        files: Mapping[str, PortFile],
        dry_run: bool,
        confirm_within: float = takeovers.DEFAULT_WITHIN,
    ) -> Outcome:
        """Put a config in force, all of it or none; the caller holds the lock."""
        if self._pending and not dry_run:
            raise UsageError(
                f"{_named(self._pending)} waits for its confirmation: `offload confirm` or "
                "`offload rollback` first"
            )
        wanted = await asyncio.to_thread(understand, text, source, files, self._paths, self._wanted)
        # Who changes one port has been told of the config's weak points when it was applied.
        told = wanted.config if text != self._wanted.text else None
        changed = differing({} if told else self._wanted.config.ports, wanted.config.ports)
        ports = bypassed.places(wanted.config, changed)
        # Who hands over a whole config has everything looked at, and put right with it.
        alone = not told and files != self._wanted.files and not self._detached
        if dry_run:
            planned = await self._on_kernel_thread(
                lambda: self._reconciler.plan(wanted.config, may_take=not alone)
            )
            return await self._on_kernel_thread(
                lambda: outcome(planned.changes, told, ports, planned.facts.host)
            )
        now = self._wanted
        former = partial(takeovers.Former.of, now.text, now.source, now.files, detached=self._detached)
        was_detached, self._detached = self._detached, False
        try:
            await self._move_metrics(wanted.config)
            if alone:  # some ports change, for which no address is taken
                result = await self._reconcile(wanted.config, strict=True, may_take=False)
            else:
                result = await self._put_in_force(wanted.config, former, confirm_within)
        except BaseException:
            self._detached = was_detached
            await self._move_metrics(self._wanted.config)
            raise
        portfiles.save(self._paths, self._wanted.files, wanted.files)
        self._keep_macs(wanted, gone=self._wanted.automatic - wanted.automatic)
        given_back = takeover.shared(self._wanted.config) - takeover.shared(wanted.config)
        macs = self._result.facts.host.macs
        takeovers.forget(self._paths.takeovers, {macs[nic] for nic in given_back & macs.keys()})
        self._wanted, self._result = wanted, result
        self._loaded, self._load_error = datetime.now(UTC), None
        done = await self._on_kernel_thread(lambda: outcome(result.changes, told, ports, result.facts.host))
        return done.model_copy(update={"takeover": _view(self._pending) if self._pending else None})

    def _keep_macs(self, wanted: Wanted, gone: Collection[str] = ()) -> None:
        """Write down what ``wanted`` drew from its range, and give back what ``gone`` ports had."""
        if allocator := _macs(wanted.asked, self._paths):
            resolve_auto(wanted.asked, allocator, wanted.heard)
            for name in gone:
                allocator.release(name)

    # Views and metrics

    def _read_views(self) -> report.Views:
        result, wanted = self._result, self._wanted
        reading = self._meter.read(wanted.config, result.desired)
        sources = {name: file.source for name, file in wanted.files.items()}
        return report.views(wanted.config, result.desired, reading, sources, self._life.since)

    async def _views(self) -> report.Views:
        return await self._on_kernel_thread(self._read_views)

    def read(self) -> Scrape:
        """``metrics.Source``: called on the metrics server's threads."""
        if not self._ready:
            raise OffloadError("the daemon is starting: there is nothing to read yet")
        views = self._thread.submit(self._read_views).result()
        return Scrape(
            ports=views.ports,
            queues=views.queues,
            nics=views.nics,
            switches=views.switches,
            durations=self._durations,
            load_error=self._load_error is not None,
        )


def _use_one_heap() -> None:
    """Let all threads allocate from one heap: they take turns anyway, and each heap keeps what it once had.

    3 MB of 79 with 100 ports. Before threads start; not every C library has it (mallopt(3)).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)


def _spare_the_collector() -> None:
    """Let the garbage collector pass by what stays, and look less often for what went.

    A pass over all objects of 1,000 ports takes 80 ms; without this a scrape had one or two of them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


def _without(wanted: Wanted, nics: Collection[str]) -> Wanted:
    """``wanted`` without the switches on these NICs."""
    asked, config = (takeover.without(config, nics) for config in (wanted.asked, wanted.config))
    return replace(wanted, asked=asked, config=config)


def _named(pending: takeovers.Pending) -> str:
    taken = (f"{', '.join(one.addresses)} from {nic}" for nic, one in pending.nics.items())
    return f"taking over {' and '.join(taken)}"


def _view(pending: takeovers.Pending) -> TakeoverView:
    left = max(0.0, pending.left())
    return TakeoverView(
        nics={nic: list(one.addresses) for nic, one in pending.nics.items()},
        deadline=datetime.now(UTC) + timedelta(seconds=left),
        seconds_left=round(left, 1),
    )


def _changed(before: Mapping[str, JsonValue], spec: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """A port's keys with those of ``spec``; guards and AF_XDP settings that it does not name stay."""
    merged = {**before, **spec}
    for key in ("allow", "af_xdp"):
        kept, given = before.get(key), spec.get(key)
        if isinstance(kept, dict) and isinstance(given, dict):
            merged[key] = {**kept, **given}
    return merged


def _without_nulls(spec: Mapping[str, JsonValue]) -> dict[str, object]:
    return {key: value for key, value in spec.items() if value is not None}
