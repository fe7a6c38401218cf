"""The daemon: holds a config, keeps the kernel like it, answers the API and Prometheus.

A config change walks ``API -> _adopt -> Reconciler.apply -> kernel``; a device that
comes or goes walks ``netlink -> _watch -> Reconciler.apply``. Both run on the one
kernel thread, so nothing ever changes the kernel twice at a time. When the daemon
ends, however it ends, frames keep flowing as they did.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from . import __version__, api, portfiles, report, takeover, takeovers
from .bridge.chain import installed
from .config import Config, merge_ports, parse, parse_port, require_supported, warnings, with_channels
from .describe import describe
from .document import dotted
from .errors import ConfigError, OffloadError, Problem, UsageError
from .handover import HandOver, offers
from .journal import Era, Journal
from .kernel import bypassed, host
from .kernel.bypassed import Place
from .kernel.counters import Meter
from .kernel.heard import heard
from .kernel.links import LinkEvents
from .kernel.service import alone, notify
from .kernel.sockets import Supply
from .kernel.system import System
from .kernel.watchdog import watch
from .macs import MacAllocator, resolve_auto
from .metrics import Durations, MetricsServer, Scrape, register, serve_metrics
from .model import Carried, Change
from .paths import Paths
from .portfiles import PortFile
from .reconcile import Reconciler, Result
from .views import (
    ConfigStatus,
    NicView,
    Outcome,
    PortView,
    QueueView,
    ReconcileStatus,
    StatusView,
    SwitchView,
    TakeoverView,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A config as it came, and as it is meant: with the ports of files, and every MAC known.

    ``asked`` still says ``auto`` where a MAC is drawn from the range. ``heard`` are addresses on the
    network that were not drawn therefore.
    """

    text: str
    source: str
    files: Mapping[str, PortFile]
    asked: Config
    config: Config
    heard: frozenset[str] = frozenset()

    @property
    def automatic(self) -> set[str]:
        """The ports that have their MAC from the range."""
        return {name for name, port in self.asked.ports.items() if port.mac == "auto"}


def understand(text: str, source: str, files: Mapping[str, PortFile], paths: Paths) -> Wanted:
    """Read a config. Raises ``ConfigError`` or ``UnsupportedError`` with everything that is wrong.

    What it draws from the range of MACs is written down when the config is in force.
    """
    base = parse(text, source)
    asked = merge_ports(base, {name: file.port for name, file in files.items()}, source)
    require_supported(asked, source)
    _require_extensions(asked, source)
    allocator = _macs(asked, paths)
    on_network: frozenset[str] = frozenset()
    config = asked
    if allocator:
        on_network = heard(asked.switches, paths.run_dir)
        config = resolve_auto(asked, allocator, on_network, keep=False)
    own = {name: file for name, file in files.items() if name not in base.ports}
    return Wanted(text, source, own, asked, with_channels(config), on_network)


def _require_extensions(config: Config, source: str) -> None:
    """Raises ConfigError for extensions of Python bridges that no package brings."""
    known = installed()
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
        self._started = datetime.now(UTC)
        self._loaded = self._started
        self._load_error: str | None = None
        self._detached = False
        self._durations = Durations()
        self._errors = 0
        self._last_seconds: float | None = None
        self._last_error: str | None = None
        self._changing = asyncio.Lock()
        self._news = asyncio.Event()
        self._changed: set[str] = set()
        self._ready = False
        self._metrics: MetricsServer | None = None
        self._listening: str | None = None
        self._end = asyncio.Event()
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
                loop.add_reader(events.fileno(), self._hear, events)
                news = self._system.dataplane.news_fd()
                loop.add_reader(news, self._hear_stations)
                self._wanted = await self._begin(wanted)
                self._keep_macs(wanted)
                self._ready = True
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
        ending = asyncio.create_task(self._end.wait())
        await asyncio.wait([serving, watching, ending], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        server.stop()
        for task in (watching, ending):
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
        self, config: Config, *, strict: bool, failed: Mapping[str, str] | None = None
    ) -> Result:
        """One reconciliation, timed and counted."""
        began = time.monotonic()
        detached = self._detached
        try:
            result = await self._on_kernel_thread(
                lambda: self._reconciler.apply(config, strict=strict, detached=detached, failed=failed)
            )
        except OffloadError as error:
            self._errors += 1
            self._last_error = str(error)
            raise
        else:
            self._last_error = None
            self._hand_over.follow(offers(config, result.facts.af_xdp.users))
            return result
        finally:
            self._last_seconds = time.monotonic() - began
            self._durations = self._durations.observed(self._last_seconds)

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

    async def _put_in_force(self, config: Config, former: takeovers.Former | None, within: float) -> Result:
        """Reconcile. A takeover that nobody confirmed is on record, and watched, before anything moves."""
        pending = await self._on_kernel_thread(lambda: self._prepare(config, former, within))
        try:
            result = await self._reconcile(config, strict=True)
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
        self, config: Config, former: takeovers.Former | None, within: float
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
        pending = takeovers.Pending(host.boot_id(), takeovers.now() + within, nics, former)
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

    def _hear(self, events: LinkEvents) -> None:
        self._changed |= {event.name for event in events.drain()}
        self._news.set()

    def _hear_stations(self) -> None:
        """The programs have seen an address for the first time, or in another place than before."""
        for news in self._system.dataplane.drain_news():
            where = "at its port" if news.state == "here" else "from the wire"
            log.info("%s, %s, heard %s", news.mac, f"VLAN {news.vid}" if news.vid else "untagged", where)
        self._news.set()

    async def _watch(self) -> None:
        """Reconcile whenever there was news, once for all that came meanwhile."""
        while True:
            await self._news.wait()
            self._news.clear()
            async with self._changing:
                changed, self._changed = self._changed, set()
                ports = self._wanted.config.ports
                failed = {
                    name: why
                    for name, why in self._result.failed.items()
                    if name in ports and ports[name].device not in changed
                }
                try:
                    self._result = await self._reconcile(self._wanted.config, strict=False, failed=failed)
                except OffloadError as error:
                    log.error("reconciliation failed: %s", error)
                except Exception:
                    log.exception("reconciliation failed")
            # An address that two places claim flips with every frame: that shall not take all the time.
            await asyncio.sleep(self._last_seconds or 0)

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
        wanted = await asyncio.to_thread(understand, text, source, files, self._paths)
        # Who changes one port has been told of the config's weak points when it was applied.
        told = wanted.config if text != self._wanted.text else None
        before = {} if told else self._wanted.config.ports
        ports = {
            name: place
            for name, place in bypassed.places(wanted.config).items()
            if wanted.config.ports[name] != before.get(name)
        }
        if dry_run:
            planned = await self._on_kernel_thread(lambda: self._reconciler.plan(wanted.config))
            return await self._on_kernel_thread(
                lambda: outcome(planned.changes, told, ports, planned.facts.host)
            )
        former = takeovers.Former.of(
            self._wanted.text, self._wanted.source, self._wanted.files, detached=self._detached
        )
        was_detached, self._detached = self._detached, False
        try:
            await self._move_metrics(wanted.config)
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
        return report.views(wanted.config, result.desired, reading, sources)

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
