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
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry
from pydantic import JsonValue

from . import __version__, api, portfiles, report
from .config import Config, merge_ports, parse, parse_port, require_supported, warnings
from .describe import describe
from .errors import OffloadError, UsageError
from .journal import Era, Journal
from .kernel import host
from .kernel.counters import Meter
from .kernel.links import LinkEvents
from .kernel.service import alone, notify
from .kernel.system import System
from .macs import MacAllocator, resolve_auto
from .metrics import Durations, MetricsServer, Scrape, register, serve_metrics
from .model import Change
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
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A config as it came, and as it is meant: with the ports of files, and every MAC known.

    ``asked`` still says ``auto`` where a MAC is drawn from the range.
    """

    text: str
    source: str
    files: Mapping[str, PortFile]
    asked: Config
    config: Config

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
    allocator = _macs(asked, paths)
    config = resolve_auto(asked, allocator, keep=False) if allocator else asked
    own = {name: file for name, file in files.items() if name not in base.ports}
    return Wanted(text, source, own, asked, config)


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


def outcome(changes: tuple[Change, ...], config: Config | None) -> Outcome:
    return Outcome(
        changes=[describe(change) for change in changes], warnings=warnings(config) if config else []
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
        self._reconciler = Reconciler(system, Journal(paths.journal, era()))
        self._meter = Meter(system)
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
                self._result = await self._reconcile(wanted.config, strict=True)
                self._keep_macs(wanted)
                self._wanted = wanted
                self._ready = True
                notify(f"READY=1\nSTATUS={len(wanted.config.ports)} ports")
                log.info("ready: %s", self._paths.socket)
                await self._until_end(server)
                loop.remove_reader(events.fileno())
        finally:
            server.close()
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
            return result
        finally:
            self._last_seconds = time.monotonic() - began
            self._durations = self._durations.observed(self._last_seconds)

    # Devices that come, go and change

    def _hear(self, events: LinkEvents) -> None:
        self._changed |= {event.name for event in events.drain()}
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
            counts=views.counts(),
            warnings=[*warnings(wanted.config), *(p for nic in views.nics for p in nic.problems)],
        )

    async def nics(self) -> list[NicView]:
        return (await self._views()).nics

    async def switches(self) -> list[SwitchView]:
        return (await self._views()).switches

    async def ports(self) -> list[PortView]:
        return (await self._views()).ports

    async def queues(self) -> list[QueueView]:
        return (await self._views()).queues

    async def apply(self, text: str, source: str, dry_run: bool) -> Outcome:
        async with self._changing:
            try:
                return await self._adopt(text, source, self._files(), dry_run)
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
            port = parse_port(name, _without_nulls({**before, **spec}), "port set")
            files = {**self._files(), name: replace(file, port=port)}
            return await self._adopt(self._wanted.text, self._wanted.source, files, dry_run)

    async def port_remove(self, name: str, dry_run: bool) -> Outcome:
        async with self._changing:
            self._port_file(name)
            files = {other: file for other, file in self._files().items() if other != name}
            return await self._adopt(self._wanted.text, self._wanted.source, files, dry_run)

    async def detach(self, everything: bool) -> Outcome:
        async with self._changing:
            config = self._wanted.config
            if everything:
                changes = await self._on_kernel_thread(
                    lambda: self._reconciler.take_out(config, everything=True)
                )
                await self._on_kernel_thread(self._system.dataplane.remove_everything)
                self._end.set()
                return outcome(changes, None)
            self._detached = True
            self._result = await self._reconcile(config, strict=False)
            return outcome(self._result.changes, None)

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

    async def _adopt(self, text: str, source: str, files: Mapping[str, PortFile], dry_run: bool) -> Outcome:
        """Put a config in force, all of it or none; the caller holds the lock."""
        wanted = await asyncio.to_thread(understand, text, source, files, self._paths)
        # Who changes one port has been told of the config's weak points when it was applied.
        told = wanted.config if text != self._wanted.text else None
        if dry_run:
            planned = await self._on_kernel_thread(lambda: self._reconciler.plan(wanted.config))
            return outcome(planned.changes, told)
        was_detached, self._detached = self._detached, False
        try:
            await self._move_metrics(wanted.config)
            result = await self._reconcile(wanted.config, strict=True)
        except BaseException:
            self._detached = was_detached
            await self._move_metrics(self._wanted.config)
            raise
        portfiles.save(self._paths, self._wanted.files, wanted.files)
        self._keep_macs(wanted, gone=self._wanted.automatic - wanted.automatic)
        self._wanted, self._result = wanted, result
        self._loaded, self._load_error = datetime.now(UTC), None
        return outcome(result.changes, told)

    def _keep_macs(self, wanted: Wanted, gone: Collection[str] = ()) -> None:
        """Write down what ``wanted`` drew from its range, and give back what ``gone`` ports had."""
        if allocator := _macs(wanted.asked, self._paths):
            resolve_auto(wanted.asked, allocator)
            for name in gone:
                allocator.release(name)

    # Views and metrics

    def _read_views(self) -> report.Views:
        result, wanted = self._result, self._wanted
        reading = self._meter.read(result.desired)
        sources = {name: file.source for name, file in wanted.files.items()}
        return report.views(wanted.config, result.desired, reading, sources, self._detached)

    async def _views(self) -> report.Views:
        return await self._on_kernel_thread(self._read_views)

    def read(self) -> Scrape:
        """``metrics.Source``: called on the metrics server's threads."""
        if not self._ready:
            raise OffloadError("the daemon is starting: there is nothing to read yet")
        views = self._thread.submit(self._read_views).result()
        return Scrape(views.ports, views.queues, views.nics, self._durations, self._load_error is not None)


def _without_nulls(spec: Mapping[str, JsonValue]) -> dict[str, object]:
    return {key: value for key, value in spec.items() if value is not None}
