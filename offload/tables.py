"""Views as tables for people.

A table is as wide as its content: nothing is cut off, colours appear only on a
terminal, and what is read from the kernel or a config is never taken for markup.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from offload.views import (
    AfXdpChannel,
    CounterPath,
    HardwareQueues,
    HostView,
    NetworkView,
    NicView,
    PortView,
    QueueEvent,
    QueueView,
    Rate,
    StatusView,
    SwitchView,
    TopView,
    Traffic,
)

_FEW = 3
"""Ports that a line of ``top`` names."""

_QUEUES = {"tcp": "queue (TCP by GRO)", "gro": "queue (by GRO)"}
"""How frames of a queue reach the device, where that is not one by one."""
_RIGHT = frozenset(
    [
        "ID",
        "CPU",
        "RX QUEUES",
        "FILTERS",
        "WAITING",
        "RX DROPPED",
        "RX PACKETS",
        "TX PACKETS",
        "PACKETS",
        "BYTES",
        "BUSY",
        "SOFTIRQ",
        "RX FRAMES/S",
        "RX BIT/S",
        "TX FRAMES/S",
        "TX BIT/S",
        "FRAMES/S",
        "BIT/S",
        "DROPS/S",
    ]
)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output; the headings alone when there are no rows."""
    _print(_table(headings, rows))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(Text(heading), justify="right" if heading in _RIGHT else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    # A lone TERM or COLUMNS must not squeeze the table: the terminal may wrap, we do not cut.
    wide = console.options.update(max_width=1_000_000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def status(view: StatusView) -> None:
    """The daemon at a glance, a line per fact."""
    config, reconcile, counts = view.config, view.reconcile, view.counts
    rows = [
        ("offload", view.version),
        ("daemon", f"process {view.pid}, since {view.started:%Y-%m-%d %H:%M:%S %Z}"),
        ("fast path", "detached: the bridges forward alone" if view.detached else "attached"),
        ("config", _or_dash(config.file)),
        ("  loaded", f"{config.loaded:%Y-%m-%d %H:%M:%S %Z}" if config.loaded else "never"),
        ("  digest", _or_dash(config.digest)),
        ("reconciled", f"{reconcile.runs} times, {reconcile.errors} failed"),
        ("  last took", "-" if reconcile.last_seconds is None else f"{reconcile.last_seconds * 1000:.1f} ms"),
        (
            "ports",
            f"{counts.ports}, {counts.ports_active} active, {counts.queues_waiting} waiting for a queue",
        ),
        ("VM queues", f"{counts.queues}, with {counts.filters} filters"),
        ("NICs", str(counts.nics)),
        ("switches", str(counts.switches)),
    ]
    if view.takeover:
        taken = (f"{', '.join(addresses)} from {nic}" for nic, addresses in view.takeover.nics.items())
        left = f"{view.takeover.seconds_left:.0f} s left for `offload confirm`"
        rows.append(("takeover", f"{'; '.join(taken)}: {left}"))
    if config.load_error:
        rows += _lines("last config refused", config.load_error)
    if reconcile.last_error:
        rows += _lines("last failure", reconcile.last_error)
    for warning in view.warnings:
        rows += _lines("warning", warning)
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:{width}}  {value}".rstrip())


def nics(views: Iterable[NicView]) -> None:
    """The NICs, and what goes past the VM queues of each."""
    show(
        (
            *("NIC", "DRIVER", "XDP", "PROGRAM", "RX QUEUES", "VM QUEUES", "FILTERS", "WAITING"),
            *("RX DROPPED", "DEFAULT QUEUE", "PROBLEMS"),
        ),
        (
            (
                view.name,
                _or_dash(view.driver),
                view.mode if view.mode else f"none ({view.mode_asked} asked)",
                view.program.tag if view.program else "-",
                _or_dash(view.rx_queues),
                _vm_queues(view.hardware_queues),
                str(view.filters),
                str(view.queues_waiting),
                str(view.rx_dropped),
                _by_reason(view.default_queue),
                "; ".join(view.problems) or "-",
            )
            for view in views
        ),
    )


def _vm_queues(queues: HardwareQueues | None) -> str:
    """``hardware 2/7 (SR-IOV)``: how many hardware queues serve a port, of how many. Or ``software``."""
    if queues is None:
        return "-"
    if queues.how is None:
        return "software"
    return f"hardware {queues.in_use}/{queues.total} ({'rules' if queues.how == 'rules' else 'SR-IOV'})"


def switches(views: Iterable[SwitchView]) -> None:
    """The switches: who is on them, in which VLAN, and what went over their bridges."""
    show(
        (
            "SWITCH",
            "TYPE",
            "UPLINK",
            "BRIDGE",
            "HOST",
            "HOST PACKETS",
            "NETWORKS",
            "DEFAULT PATH",
            "PROBLEMS",
        ),
        (
            (
                view.name,
                view.type,
                _or_dash(view.uplink),
                _bridge(view),
                _host(view.host_interface),
                _host_packets(view.host_interface),
                "; ".join(map(_network, view.networks)) or "-",
                ", ".join(f"{way} {count}" for way, count in _default_path(view).items() if count) or "0",
                "; ".join(view.problems) or "-",
            )
            for view in views
        ),
    )


def ports(views: Iterable[PortView]) -> None:
    """The ports: their paths, what they carried, and why not more."""
    show(
        (
            *("PORT", "SWITCH", "DEVICE", "MAC", "VLAN", "STATE", "PATH", "QUEUE", "CPU"),
            *("RX PACKETS", "TX PACKETS", "DROPS", "REASON"),
        ),
        (
            (
                view.name,
                view.switch,
                _end(view),
                ", ".join(view.mac) or "-",
                _or_dash(view.vlan),
                view.state,
                view.path if view.path != "queue" else _QUEUES.get(view.delivery or "", "queue"),
                f"{view.queue.id} ({view.queue.kind})" if view.queue else "-",
                _or_dash(view.queue.cpu) if view.queue else "-",
                _packets(view.counters.rx),
                _packets(view.counters.tx),
                _by_reason(view.counters.drops),
                _or_dash(view.reason),
            )
            for view in views
        ),
    )


def queues(views: Iterable[QueueView]) -> None:
    """The queues of all NICs, and where those are that the NIC itself fills."""
    views = list(views)
    somewhere = any(view.kind == "hardware" for view in views)
    show(
        (
            *("NIC", "ID", "KIND", *(["WHERE"] if somewhere else []), "STATE", "CPU"),
            *("PORTS", "FILTERS", "PACKETS", "BYTES", "DROPS"),
        ),
        (
            (
                *(view.nic, str(view.id), view.kind, *([_where(view)] if somewhere else [])),
                view.state,
                _or_dash(view.cpu),
                ", ".join(view.ports) or "-",
                str(len(view.filters)),
                str(view.packets),
                str(view.bytes),
                _by_reason(view.drops_by_reason),
            )
            for view in views
        ),
    )


def events(views: Iterable[QueueEvent]) -> None:
    """What happened to VM queues."""
    show(
        ("TIME", "NIC", "ID", "PORT", "WHAT"),
        (
            (f"{view.time:%Y-%m-%d %H:%M:%S %Z}", view.nic, str(view.queue), view.port, view.text)
            for view in views
        ),
    )


class Screen:
    """Where ``top`` shows the rates of a while: a terminal, drawn anew each time, or one below the other."""

    def __init__(self, live: bool) -> None:
        self._live = Live(screen=True, auto_refresh=False) if live else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.__enter__()
            self._draw(Text("offload top: looking …"))
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._live:
            self._live.__exit__(*raised)

    def show(self, view: TopView | Exception) -> None:
        """Draw or print. An exception says why there is nothing to see."""
        if self._live:
            self._draw(_fitted(view, self._live.console.height))
        elif isinstance(view, TopView):
            print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S %Z}, {view.seconds:.1f} s, {_total(view)}")
            for table in _top_tables(view):
                _print(table)
            print(flush=True)

    def _draw(self, what: Text | Group) -> None:
        """Ctrl-C waits till the terminal has the whole of it."""
        assert self._live
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._live.update(what, refresh=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fitted(view: TopView | Exception, height: int) -> Group:
    """For a terminal of so many lines: what has no room is left out, and counted."""
    if isinstance(view, Exception):
        return Group(Text(str(view)), Text("waiting for it; q to quit"))
    room = max(height - 8, 6)  # lines that are no rows
    cpus = min(len(view.cpus), max(room // 5, 2))
    queues = min(len(view.queues), max(room // 3, 2))
    limits = (cpus, queues, max(room - cpus - queues, 2))
    lines: list[Text | Table] = [
        Text(f"offload top: {view.seconds:.1f} s, {len(view.ports)} ports, {_total(view)}; q to quit")
    ]
    for limit, (what, table) in zip(
        limits, zip(("CPUs", "queues", "ports"), _top_tables(view, limits), strict=True), strict=True
    ):
        more = len(getattr(view, what.lower())) - limit
        lines += [table, Text(f"and {more} more {what}" if more > 0 else "")]
    return Group(*lines)


def _top_tables(view: TopView, limits: Sequence[int | None] = (None, None, None)) -> list[Table]:
    cpus, queues, ports = limits
    busiest = sorted(view.cpus, key=lambda one: one.busy, reverse=True) if cpus else view.cpus
    return [
        _table(
            ("CPU", "BUSY", "SOFTIRQ", "QUEUES"),
            (
                (str(one.cpu), f"{one.busy:.0%}", f"{one.softirq:.0%}", ", ".join(one.queues) or "-")
                for one in busiest[:cpus]
            ),
        ),
        _table(
            ("NIC", "ID", "KIND", "STATE", "CPU", "PORTS", "FRAMES/S", "BIT/S", "DROPS/S"),
            (
                (
                    *(one.nic, str(one.id), one.kind, one.state, _or_dash(one.cpu)),
                    ", ".join(one.ports[:_FEW]) + (", …" if len(one.ports) > _FEW else "") or "-",
                    *(_per_second(one.rate.packets), _per_second(one.rate.bytes * 8)),
                    _drops_per_second(one.drops),
                )
                for one in view.queues[:queues]
            ),
        ),
        _table(
            (
                *("PORT", "SWITCH", "STATE", "PATH", "QUEUE", "CPU", "RX FRAMES/S", "RX BIT/S", "RX BY"),
                *("TX FRAMES/S", "TX BIT/S", "DROPS/S"),
            ),
            (
                (
                    *(one.name, one.switch, one.state, one.path, _or_dash(one.queue), _or_dash(one.cpu)),
                    *(*_sums(one.rx), _shares(one.rx), *_sums(one.tx)),
                    _drops_per_second(one.drops),
                )
                for one in view.ports[:ports]
            ),
        ),
    ]


def _total(view: TopView) -> str:
    ways = {"rx": [one.rx for one in view.ports], "tx": [one.tx for one in view.ports]}
    told = []
    for way, paths in ways.items():
        rates = [rate for each in paths for rate in each.values()]
        packets, octets = (sum(rate.packets for rate in rates), sum(rate.bytes for rate in rates))
        told.append(f"{way} {_per_second(packets)} frames/s, {_per_second(octets * 8)} bit/s")
    return ", ".join(told)


def _sums(paths: Mapping[CounterPath, Rate]) -> tuple[str, str]:
    packets = sum(rate.packets for rate in paths.values())
    return _per_second(packets), _per_second(sum(rate.bytes for rate in paths.values()) * 8)


def _shares(paths: Mapping[CounterPath, Rate]) -> str:
    """``queue 98 %, bridge 2 %``: which way the frames took."""
    whole = sum(rate.packets for rate in paths.values())
    shown = [f"{path} {rate.packets / whole:.0%}" for path, rate in paths.items() if rate.packets]
    return ", ".join(shown) or "-"


def _drops_per_second(drops: Mapping[str, float]) -> str:
    return ", ".join(f"{reason} {_per_second(count)}" for reason, count in sorted(drops.items())) or "0"


def _per_second(value: float) -> str:
    """Three digits that count, and the unit's prefix: ``0``, ``0.5``, ``12``, ``84.2 k``, ``1.23 M``."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5 or prefix == "G":
            break
        value /= 1000
    if prefix:
        digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
        return f"{value:.{digits}f} {prefix}"
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _where(view: QueueView) -> str:
    """``RX 3``, ``eth1v0 (VLAN 10 by the NIC)``; ``-`` for a queue that the NIC does not fill."""
    vlans = [str(one.vlan) for one in view.filters if one.vlan] if view.vlan_by == "nic" else []
    place = view.device or ("-" if view.rx_queue is None else f"RX {view.rx_queue}")
    told = [f"VLAN {', '.join(vlans)} by the NIC"] if vlans else []
    told += ["not sorted there"] if view.standing is False else []
    return f"{place} ({'; '.join(told)})" if told else place


def _end(view: PortView) -> str:
    """A port's device, or its channels: ``AF_XDP (eth1/0 zero copy, eth1/1 zero copy, xsk0/0 copy)``."""
    if view.af_xdp is None:
        return view.device or "AF_XDP (not there)"
    return f"AF_XDP ({', '.join(map(_channel, view.af_xdp.channels))})"


def _channel(channel: AfXdpChannel) -> str:
    how = {True: "zero copy", False: "copy", None: "copy or not"}[channel.zero_copy]
    told = how if channel.consumer else "no consumer"
    return f"{channel.ifname}/{channel.queue} {told}"


def _bridge(view: SwitchView) -> str:
    """What carries the default path: ``kernel``, or ``python (running, mirror; ring 3)``."""
    if view.device is None:
        return f"{view.bridge} (not there)"
    if view.python_bridge is None:
        return view.bridge
    process = view.python_bridge
    extensions = [each.name if each.state == "on" else f"{each.name} off" for each in process.extensions]
    told = ", ".join(["running" if process.running else "not running", *extensions])
    lost = _by_reason(process.drops)
    return f"{view.bridge} ({told})" if lost == "0" else f"{view.bridge} ({told}; {lost})"


def _host(host: HostView | None) -> str:
    if host is None:
        return "-"
    vlan = f" VLAN {host.vlan}" if host.vlan else ""
    there = "" if host.present else " (not there)"
    return " ".join([f"{host.interface}{vlan}{there}", *host.addresses])


def _host_packets(host: HostView | None) -> str:
    if host is None:
        return "-"
    told = f"rx {_packets(host.counters.rx)}; tx {_packets(host.counters.tx)}"
    lost = _by_reason(host.counters.drops)
    return told if lost == "0" else f"{told}; dropped {lost}"


def _network(network: NetworkView) -> str:
    members = [*network.ports, *(["host"] if network.host else [])]
    return f"{network.vlan or 'untagged'}: {', '.join(members)}"


def _default_path(view: SwitchView) -> dict[str, int]:
    path = view.default_path
    return {
        "from ports": path.from_ports.packets,
        "from wire": path.from_wire.packets,
        "to ports": path.to_ports.packets,
    }


def _packets(paths: Mapping[CounterPath, Traffic]) -> str:
    shown = [f"{path} {traffic.packets}" for path, traffic in paths.items() if traffic.packets]
    return ", ".join(shown) or "0"


def _by_reason(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()) if count) or "0"


def _or_dash(value: str | int | None) -> str:
    return "-" if value is None else str(value)


def _lines(key: str, text: str) -> list[tuple[str, str]]:
    first, *rest = text.splitlines() or [""]
    return [(key, first), *(("", line) for line in rest)]
