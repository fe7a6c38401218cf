"""Reading the counters of everything at one moment, and telling loss from frames under way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bridge import state
from ..channels import INNER
from ..config import Config, PortConfig
from ..errors import OffloadError
from ..model import Link, PortRecord, PortSlot
from ..plan import RING_SIZE, Desired
from ..report import (
    ChannelReading,
    HeardAddress,
    Reading,
    heard_addresses,
    python_bridge,
    silent_bridge,
)
from ..views import AfXdp, AfXdpChannel, PythonBridgeView
from . import load
from .channels import Channels
from .host import Answer
from .sockets import user_name
from .system import System
from .xskdiag import Listed, listed

_PATIENCE = 0.05
"""Seconds to wait for the queues' CPUs to be done with what was sent to them."""


class Meter:
    """Reads counters. Keeps what was found lost and how often ports moved, so that neither goes back."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._lost: dict[tuple[int, str], int] = {}
        self._moves: dict[tuple[int, str], _Growing] = {}
        self._xsk_lost: dict[tuple[str, str, int], _Growing] = {}
        self._capabilities: dict[str, _Known] = {}

    def read(self, config: Config, desired: Desired) -> Reading:
        """The counters now. Takes up to 50 ms longer while frames are on their way between CPUs.

        A cpumap's ring tells nobody when it is full. What was sent to it, less what has come out
        once its thread slept (which it does only over an empty ring), is what it lost. While a
        thread does not sleep, a ring's worth of the difference may still be waiting.
        """
        plane = self._system.dataplane
        names = {
            resource.port_id: PortRecord.of(value).name
            for resource, value in desired.state.items()
            if isinstance(resource, PortSlot) and isinstance(value, tuple)
        }
        count = max(names, default=-1) + 1
        first = second = plane.port_counters(count)
        known = {port_id: self._lost.get((port_id, name), 0) for port_id, name in names.items()}
        waiting = 0
        if any(_missing(first[port_id], first[port_id]) > lost for port_id, lost in known.items()):
            waiting = 0 if self._all_done(count) else RING_SIZE
            second = plane.port_counters(count)
        lost = {
            port_id: max(known[port_id], _missing(first[port_id], second[port_id]) - waiting)
            for port_id in names
        }
        self._lost = {(port_id, name): lost[port_id] for port_id, name in names.items()}
        links = self._system.links.snapshot()
        attached = plane.uplinks()
        uplinks = {name: link.ifindex for name, link in links.items() if link.ifindex in attached}
        heard = heard_addresses(plane.stations())
        functions = plane.functions()
        asked = {name: self._asked(links[name]) for name in config.nics if name in links}
        return Reading(
            links=links,
            ids={name: port_id for port_id, name in names.items()},
            ports={port_id: second[port_id] for port_id in names},
            nics={name: plane.nic_counters(ifindex) for name, ifindex in uplinks.items()},
            lost=lost,
            programs={name: plane.program(ifindex) for name, ifindex in uplinks.items()},
            filters={name: len(plane.nic(ifindex).classifier) for name, ifindex in uplinks.items()},
            drivers={name: self._system.driver(name) for name in uplinks},
            heard=heard,
            moves={port_id: self._moved(port_id, name, heard) for port_id, name in names.items()},
            functions={
                name: plane.function_counters(link.ifindex)
                for name, link in links.items()
                if link.ifindex in functions
            },
            untagged={row.name: row.untagged for row in plane.networks().values()},
            capabilities={name: nic.capabilities for name, nic in asked.items()},
            numa_nodes={name: nic.numa_node for name, nic in asked.items() if nic.numa_node is not None},
            host_addresses=self._host_addresses(config, links),
            bridges={
                name: _python_bridge(self._system.paths.run_dir, name)
                for name, switch in config.switches.items()
                if switch.bridge == "python"
            },
            channels={
                name: self._channels(
                    name,
                    port,
                    config.switches[port.switch].uplink,
                    links,
                    second[desired.ports[name].port_id]["socket"]["packets"],
                )
                for name, port in config.ports.items()
                if port.af_xdp
                and port.device in links
                and (self._system.channels.pins(name) / "link").exists()
            },
        )

    def _asked(self, nic: Link) -> _Known:
        """What a NIC can do: asked when it comes, starts, stops, or gets or loses its program."""
        state = (nic.ifindex, nic.up, nic.xdp_mode, nic.mtu)
        known = self._capabilities.get(nic.name)
        if known is None or known.state != state:
            known = _Known(state, self._system.capabilities(nic), self._system.numa_node(nic))
            self._capabilities[nic.name] = known
        return known

    def _channels(
        self, name: str, port: PortConfig, uplink: str | None, links: Mapping[str, Link], on_nic: int
    ) -> ChannelReading:
        """The channels of an AF_XDP port whose device is there; ``on_nic`` went to sockets of its NIC."""
        channels, paths = self._system.channels, self._system.paths
        inner = channels.inner(links[port.device or ""])
        seen = channels.counters(name)
        bound = listed(channels.namespace(name))
        shown = [_shown(channels, name, "xsks", INNER, inner.ifindex, 0, bound)]
        nic = links.get(uplink or "")
        if nic and channels.owner(name, "nic_sockets") is not None:
            bound = listed()
            shown = [
                *(
                    _shown(channels, name, "nic_sockets", nic.name, nic.ifindex, queue, bound)
                    for queue in range(self._system.rx_queues(nic))
                ),
                *shown,
            ]
        return ChannelReading(
            shown=AfXdp(
                channels=shown,
                namespace=str(paths.namespace(name)),
                hand_over=str(paths.hand_over(name)),
                handed={"hardware": on_nic, "software": seen["handed"]["packets"]},
            ),
            no_consumer=seen["no_consumer"]["packets"],
            # At the inner end, a veth, the device counts what a socket had no room for.
            lost=inner.rx_dropped + sum(self._lost_on_nic(name, one) for one in shown),
        )

    def _lost_on_nic(self, port: str, channel: AfXdpChannel) -> int:
        """What was lost on a NIC's queue, with what was before on sockets that have been closed."""
        if channel.kind == "software":
            return 0
        growing = self._xsk_lost.setdefault((port, channel.ifname, channel.queue), _Growing())
        return growing.read(sum(channel.lost.values()))

    def _moved(self, port_id: int, name: str, heard: Mapping[int, Mapping[str, HeardAddress]]) -> int:
        """How often addresses of a port went to the wire, those of devices that have gone included."""
        now = sum(address.moves for address in heard.get(port_id, {}).values())
        growing = self._moves.setdefault((port_id, name), _Growing())
        return growing.read(now)

    def _host_addresses(self, config: Config, links: Mapping[str, Link]) -> dict[str, tuple[str, ...]]:
        """Addresses of the host's interfaces that are there, by interface."""
        hosts = [switch.host.interface for switch in config.switches.values() if switch.host]
        return {
            name: tuple(self._system.links.global_addresses(links[name].ifindex))
            for name in hosts
            if name in links
        }

    def _all_done(self, count: int) -> bool:
        """Whether the queues' CPUs have dealt with everything that was sent to them before this call.

        Where their threads cannot be seen, as in a container, a while without any frame has to do.
        """
        plane = self._system.dataplane
        threads = load.threads(plane.queue_map_ids())
        if threads:
            return _all_slept(threads)
        before = plane.port_counters(count)
        time.sleep(_PATIENCE)
        return plane.port_counters(count) == before


def _python_bridge(run_dir: Path, switch: str) -> PythonBridgeView:
    try:
        return python_bridge(state.read(run_dir, switch))
    except FileNotFoundError:
        return silent_bridge("it has not written its counters yet")
    except OffloadError as error:
        return silent_bridge(str(error))


def _shown(
    channels: Channels,
    port: str,
    sockets: str,
    device: str,
    ifindex: int,
    queue: int,
    there: list[Listed] | None,
) -> AfXdpChannel:
    """One queue of a channel; ``there``: the sockets of its namespace, ``None`` where nobody tells."""
    bound = next((one for one in there or () if (one.ifindex, one.queue) == (ifindex, queue)), None)
    taken = channels.has_consumer(port, sockets, queue)
    levels = channels.holders.levels(port, device, queue) if taken else None
    hardware = sockets == "nic_sockets"
    zero_copy = bound.zero_copy if bound else levels.zero_copy if levels else None
    lost = {"rx": bound.rx_full, "fill": bound.no_chunk} if bound else {}
    return AfXdpChannel(
        kind="hardware" if hardware else "software",
        ifname=device,
        queue=queue,
        zero_copy=zero_copy if hardware else False,
        map_path=str(channels.pins(port) / sockets),
        map_index=queue,
        consumer=None if not taken else user_name(bound.uid) if bound else "present",
        lost=lost or dict(levels.lost if levels else {}),
        filled=dict(levels.filled if levels else {}),
        wants_waking=dict(levels.wants_waking if levels else {}),
    )


@dataclass(frozen=True)
class _Known:
    """Answers about a NIC, and the state in which it was asked."""

    state: tuple[object, ...]
    capabilities: Mapping[str, Answer]
    numa_node: int | None


class _Growing:
    """A count that goes on where it was when what it is read from begins anew."""

    def __init__(self) -> None:
        self._before = 0
        self._last = 0

    def read(self, now: int) -> int:
        if now < self._last:
            self._before += self._last
        self._last = now
        return self._before + now


def _missing(sent: Mapping[str, Any], received: Mapping[str, Any]) -> int:
    came_out = received["handed"]["packets"] + received["returned"]["packets"] + received["vlan_queue"]
    return int(sent["queued"]["packets"] - came_out)


def _all_slept(threads: Sequence[int]) -> bool:
    """Whether each of these threads is seen asleep at some time from now on, within ``_PATIENCE``."""
    end = time.monotonic() + _PATIENCE
    while True:
        threads = [pid for pid in threads if not load.all_asleep([pid])]
        if not threads:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_PATIENCE / 20)
