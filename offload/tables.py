"""Views as tables for people.

A table is as wide as its content: nothing is cut off, colours appear only on a
terminal, and what is read from the kernel or a config is never taken for markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from offload.views import (
    AfXdpChannel,
    CounterPath,
    HostView,
    NetworkView,
    NicView,
    PortView,
    QueueView,
    StatusView,
    SwitchView,
    Traffic,
)

_RIGHT = frozenset(
    ["ID", "CPU", "FILTERS", "WAITING", "RX DROPPED", "RX PACKETS", "TX PACKETS", "PACKETS", "BYTES"]
)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output; the headings alone when there are no rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(Text(heading), justify="right" if heading in _RIGHT else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
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
        ("NIC", "DRIVER", "XDP", "PROGRAM", "FILTERS", "WAITING", "RX DROPPED", "DEFAULT QUEUE", "PROBLEMS"),
        (
            (
                view.name,
                _or_dash(view.driver),
                view.mode if view.mode else f"none ({view.mode_asked} asked)",
                view.program.tag if view.program else "-",
                str(view.filters),
                str(view.queues_waiting),
                str(view.rx_dropped),
                _by_reason(view.default_queue),
                "; ".join(view.problems) or "-",
            )
            for view in views
        ),
    )


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
                view.path,
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
    """The queues of all NICs."""
    show(
        ("NIC", "ID", "KIND", "STATE", "CPU", "PORTS", "FILTERS", "PACKETS", "BYTES", "DROPS"),
        (
            (
                view.nic,
                str(view.id),
                view.kind,
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
