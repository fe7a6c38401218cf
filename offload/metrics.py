"""Every metric that offload exports, and the server that hands them out.

All families are declared in ``_FAMILIES``. Nothing is kept here: each scrape
asks the ``Source``, which reads the kernel's maps. A source that cannot read
raises, and the scrape fails with HTTP 500 rather than showing zeros.
"""

from __future__ import annotations

import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

import offload
from offload.config import split_listen
from offload.errors import OffloadError, PrivilegeError, UsageError
from offload.views import PORT_STATES, QUEUE_STATES, AfXdp, Counters, NicView, PortView, QueueView, SwitchView

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of ``offload_reconcile_duration_seconds``, in seconds."""

_FAMILIES: dict[str, tuple[Callable[[str, str], Metric], str]] = {
    "offload_port_packets": (
        CounterMetricFamily,
        "Frames of a port by path; direction rx is towards the VM, tx is what it sent.",
    ),
    "offload_port_bytes": (
        CounterMetricFamily,
        "Bytes of a port's frames by path; direction rx is towards the VM, tx is what it sent.",
    ),
    "offload_port_drops": (
        CounterMetricFamily,
        "Frames of a port that were dropped, both directions, by reason.",
    ),
    "offload_port_moves": (
        CounterMetricFamily,
        "Times that an address of a port was heard from the wire instead: its VM moved, or it is used twice.",
    ),
    "offload_port": (InfoMetricFamily, "What a port is."),
    "offload_port_state": (GaugeMetricFamily, "1 for the state that a port is in, 0 for the others."),
    "offload_queue_packets": (
        CounterMetricFamily,
        "Frames sorted into a queue; queue 0 is the default queue.",
    ),
    "offload_queue_bytes": (CounterMetricFamily, "Bytes of the frames sorted into a queue."),
    "offload_queue_drops": (
        CounterMetricFamily,
        "Frames sorted into a queue and lost before the hand-over, by reason.",
    ),
    "offload_queue_not_taken_packets": (
        CounterMetricFamily,
        "Frames that came to a hardware queue and went the default path instead, by reason: group (the NIC "
        "itself had them too), passed.",
    ),
    "offload_queue": (InfoMetricFamily, "What a queue is: default, hardware or software."),
    "offload_queue_cpu": (
        GaugeMetricFamily,
        "The CPU that serves a queue; absent when it has none of its own.",
    ),
    "offload_queue_state": (GaugeMetricFamily, "1 for the state that a queue is in, 0 for the others."),
    "offload_default_queue_packets": (
        CounterMetricFamily,
        "Frames that went to the default queue, by reason.",
    ),
    "offload_host_packets": (
        CounterMetricFamily,
        "Frames of the host's interface on a switch by path; direction rx is towards the host.",
    ),
    "offload_host_bytes": (
        CounterMetricFamily,
        "Bytes of the frames of the host's interface on a switch by path; rx is towards the host.",
    ),
    "offload_host_drops": (
        CounterMetricFamily,
        "Frames of the host's interface on a switch that were dropped, both directions, by reason.",
    ),
    "offload_bridge_up": (
        GaugeMetricFamily,
        "1 while the process of a switch's Python bridge runs, 0 when not.",
    ),
    "offload_bridge_frames": (CounterMetricFamily, "Frames that a switch's Python bridge has read."),
    "offload_bridge_drops": (
        CounterMetricFamily,
        "Frames that a switch's Python bridge lost or dropped, by reason.",
    ),
    "offload_xsk_handed_packets": (
        CounterMetricFamily,
        "Frames of an AF_XDP port given to a socket; channel hardware is on its NIC's queues.",
    ),
    "offload_xsk_lost_packets": (
        CounterMetricFamily,
        "Frames that the kernel lost on an AF_XDP socket since it was bound, by ring: rx was full, fill had "
        "no chunk. Absent where nobody can tell; the port's drops as ring_full have them too.",
    ),
    "offload_xsk_consumer": (
        GaugeMetricFamily,
        "1 while somebody's socket is in the map of a channel's queue, 0 when nobody's is.",
    ),
    "offload_xsk_ring_entries": (
        GaugeMetricFamily,
        "Entries that are in a ring of a socket that was handed over: rx, fill, tx, completion.",
    ),
    "offload_xsk_wants_waking": (
        GaugeMetricFamily,
        "1 while the kernel waits for the consumer of a socket that was handed over to wake it, by ring.",
    ),
    "offload_xsk_zero_copy": (
        GaugeMetricFamily,
        "1 when zero copy is in force on a channel's queue, 0 when not; absent when nobody can tell.",
    ),
    "offload_filters": (GaugeMetricFamily, "Filters in a NIC's table."),
    "offload_queues_waiting": (GaugeMetricFamily, "Ports that want a queue of a NIC and have none."),
    "offload_program_run_seconds": (CounterMetricFamily, "Time spent in a NIC's XDP program, where counted."),
    "offload_reconcile_duration_seconds": (HistogramMetricFamily, "How long reconciliations took."),
    "offload_config_load_error": (GaugeMetricFamily, "1 when the last config was refused, 0 when not."),
    "offload_build": (InfoMetricFamily, "The version that runs."),
}


@dataclass(frozen=True)
class Durations:
    """A histogram at one moment.

    ``counts`` has a number of observations per bucket of ``BUCKETS`` and one more for
    everything longer; they are not cumulative. ``total`` is in seconds.
    """

    counts: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    total: float = 0.0

    def observed(self, seconds: float) -> Durations:
        """The histogram with one observation more."""
        bucket = bisect_left(BUCKETS, seconds)
        counts = (*self.counts[:bucket], self.counts[bucket] + 1, *self.counts[bucket + 1 :])
        return Durations(counts, self.total + seconds)

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them: upper bound, and all observations up to it."""
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        return [(bound, float(sum(self.counts[: place + 1]))) for place, bound in enumerate(bounds)]


@dataclass(frozen=True)
class Scrape:
    """What one scrape tells, all of it of the same moment. ``load_error``: the last config was refused."""

    ports: Sequence[PortView]
    queues: Sequence[QueueView]
    nics: Sequence[NicView]
    switches: Sequence[SwitchView]
    durations: Durations
    load_error: bool


class Source(Protocol):
    """What a scrape reads."""

    def read(self) -> Scrape:
        """Called from the metrics server's threads. Raises when anything cannot be read."""
        ...


class OffloadCollector(Collector):
    """Turns what a source reads into metric families, once per scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """The families without samples, so that registering reads nothing."""
        return iter(_empty().values())

    def collect(self) -> Iterator[Metric]:
        """All families of this moment. Everything is read before the first one is given."""
        scrape = self._source.read()
        families = _empty()
        _ports(families, scrape.ports)
        _queues(families, scrape.queues)
        _nics(families, scrape.nics)
        _switches(families, scrape.switches)
        _daemon(families, scrape.durations, scrape.load_error)
        return iter(families.values())


def register(source: Source, registry: CollectorRegistry) -> None:
    """Export ``source`` through ``registry``. Reads nothing yet."""
    registry.register(OffloadCollector(source))


def _empty() -> dict[str, Metric]:
    return {name: kind(name, text) for name, (kind, text) in _FAMILIES.items()}


def _sample(metric: Metric, suffix: str, labels: dict[str, str], value: float) -> None:
    # add_metric() builds each label dict anew; one dict serves both packets and bytes this way.
    metric.samples.append(Sample(metric.name + suffix, labels, value))


def _traffic(families: dict[str, Metric], kind: str, owner: dict[str, str], counters: Counters) -> None:
    """Frames, bytes and drops of a port or of the host; ``owner`` are the labels that name it."""
    packets, octets = families[f"offload_{kind}_packets"], families[f"offload_{kind}_bytes"]
    for direction, paths in (("rx", counters.rx), ("tx", counters.tx)):
        for path, traffic in paths.items():
            labels = {**owner, "direction": direction, "path": path}
            _sample(packets, "_total", labels, traffic.packets)
            _sample(octets, "_total", labels, traffic.bytes)
    for reason, count in counters.drops.items():
        if count:
            _sample(families[f"offload_{kind}_drops"], "_total", {**owner, "reason": reason}, count)


def _ports(families: dict[str, Metric], ports: Sequence[PortView]) -> None:
    moves, info, state = (
        families["offload_port_moves"],
        families["offload_port"],
        families["offload_port_state"],
    )
    for port in ports:
        owner = {"port": port.name, "switch": port.switch}
        _traffic(families, "port", owner, port.counters)
        _sample(moves, "_total", owner, port.moves)
        about = {
            "port": port.name,
            "switch": port.switch,
            "device": port.device or "",
            "mac": ",".join(port.mac),
            "vlan": port.vlan or "",
        }
        _sample(info, "_info", about, 1)
        for each in PORT_STATES:
            _sample(state, "", {"port": port.name, "state": each}, each == port.state)
        if port.af_xdp:
            _channels(families, owner, port.af_xdp)


def _channels(families: dict[str, Metric], owner: dict[str, str], af_xdp: AfXdp) -> None:
    for kind, count in af_xdp.handed.items():
        _sample(families["offload_xsk_handed_packets"], "_total", {**owner, "channel": kind}, count)
    for channel in af_xdp.channels:
        labels = {**owner, "channel": channel.kind, "queue": str(channel.queue)}
        _sample(families["offload_xsk_consumer"], "", labels, channel.consumer is not None)
        if channel.zero_copy is not None:
            _sample(families["offload_xsk_zero_copy"], "", labels, channel.zero_copy)
        for ring, count in channel.filled.items():
            _sample(families["offload_xsk_ring_entries"], "", {**labels, "ring": ring}, count)
        for ring, waits in channel.wants_waking.items():
            _sample(families["offload_xsk_wants_waking"], "", {**labels, "ring": ring}, waits)
        for ring, count in channel.lost.items():
            _sample(families["offload_xsk_lost_packets"], "_total", {**labels, "ring": ring}, count)


def _queues(families: dict[str, Metric], queues: Sequence[QueueView]) -> None:
    for queue in queues:
        labels = {"nic": queue.nic, "queue": str(queue.id)}
        _sample(families["offload_queue_packets"], "_total", labels, queue.packets)
        _sample(families["offload_queue_bytes"], "_total", labels, queue.bytes)
        for reason, count in queue.drops_by_reason.items():
            _sample(families["offload_queue_drops"], "_total", labels | {"reason": reason}, count)
        for reason, count in queue.not_taken.items():
            _sample(families["offload_queue_not_taken_packets"], "_total", labels | {"reason": reason}, count)
        _sample(families["offload_queue"], "_info", labels | {"kind": queue.kind}, 1)
        if queue.cpu is not None:
            _sample(families["offload_queue_cpu"], "", labels, queue.cpu)
        for each in QUEUE_STATES:
            _sample(families["offload_queue_state"], "", labels | {"state": each}, each == queue.state)


def _nics(families: dict[str, Metric], nics: Sequence[NicView]) -> None:
    for nic in nics:
        labels = {"nic": nic.name}
        for reason, count in nic.default_queue.items():
            _sample(families["offload_default_queue_packets"], "_total", labels | {"reason": reason}, count)
        _sample(families["offload_filters"], "", labels, nic.filters)
        _sample(families["offload_queues_waiting"], "", labels, nic.queues_waiting)
        if nic.program and nic.program.run_seconds is not None:
            _sample(families["offload_program_run_seconds"], "_total", labels, nic.program.run_seconds)


def _switches(families: dict[str, Metric], switches: Sequence[SwitchView]) -> None:
    for switch in switches:
        labels = {"switch": switch.name}
        if host := switch.host_interface:
            _traffic(families, "host", labels | {"interface": host.interface}, host.counters)
        if bridge := switch.python_bridge:
            _sample(families["offload_bridge_up"], "", labels, bridge.running)
            _sample(families["offload_bridge_frames"], "_total", labels, bridge.frames)
            for reason, count in bridge.drops.items():
                _sample(families["offload_bridge_drops"], "_total", labels | {"reason": reason}, count)


def _daemon(families: dict[str, Metric], durations: Durations, load_error: bool) -> None:
    histogram = families["offload_reconcile_duration_seconds"]
    assert isinstance(histogram, HistogramMetricFamily)
    histogram.add_metric([], durations.cumulative(), durations.total)
    _sample(families["offload_config_load_error"], "", {}, load_error)
    _sample(families["offload_build"], "_info", {"version": offload.__version__}, 1)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: str, port: int) -> None:
        self.address_family = family
        super().__init__((address, port), _Handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


class MetricsServer:
    """The HTTP server of the metrics, in threads of its own. Nothing outlives ``stop()``.

    ``host`` is an address or a name; port 0 takes any free one. Errors as for ``serve_metrics``.
    prometheus_client's own server wakes up twice a second, which is a third of what an idle daemon takes.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._server = _Server(family, str(address[0]), port)
        except OSError as error:
            raise _explain(error, host, port) from error
        self._server.set_app(make_wsgi_app(registry))
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopped:
            self._server.handle_request()

    @property
    def port(self) -> int:
        """The TCP port in use."""
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop answering and close the listening socket. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes up who waits for a connection
            self._thread.join()
            self._server.server_close()


def serve_metrics(listen: str, registry: CollectorRegistry) -> MetricsServer:
    """Hand out ``registry`` over HTTP at ``listen``, which is ``metrics.listen`` of the config.

    Raises UsageError when the address is not this host's or is taken, PrivilegeError
    when the port needs one, ValueError when the config's parser would refuse ``listen``.
    """
    host, port = split_listen(listen)
    return MetricsServer(host, port, registry)


def _explain(error: OSError, host: str, port: int) -> OffloadError:
    where = f"metrics.listen: {f'[{host}]' if ':' in host else host}:{port}"
    if isinstance(error, PermissionError):
        return PrivilegeError(f"{where}: a port below 1024 needs CAP_NET_BIND_SERVICE")
    return UsageError(f"{where}: {error.strerror}; free the address, or choose another in the config")
