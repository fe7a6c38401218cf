"""DPDK's testpmd: it sends every frame back with its addresses swapped."""

from __future__ import annotations

import os

from tests.consumers.consumer import Channel
from tests.consumers.packages import Tree, unpacked

_PLUGINS = ("librte_mempool_ring", "librte_net_af_xdp")
_BUFFERS = 8192
"""Each takes a page of the UMEM, since it is not in huge pages. 2,048 are in the fill ring at once."""


def fetched() -> Tree:
    """Debian 13's DPDK: 24.03 was the first with ``use_pinned_map`` and ``dp_path``."""
    return unpacked("dpdk", "trixie", "dpdk-dev", "librte-net-af-xdp25", "librte-mempool-ring25")


def pinned_map(channel: Channel) -> str:
    """The device option for a pinned XSKMAP, which needs the right to open it."""
    return f"{_device(channel)},use_pinned_map=1,dp_path={channel.map_path}"


def hand_over(channel: Channel) -> str:
    """The device option for an XSKMAP handed over a unix socket."""
    return f"{_device(channel)},use_cni=1,dp_path={channel.hand_over}"


def by_itself(channel: Channel) -> str:
    """The device option that leaves all to libxdp, which looks for its own program on the device."""
    return _device(channel)


def _device(channel: Channel) -> str:
    return f"net_af_xdp0,iface={channel.ifname},start_queue={channel.queue},queue_count=1"


def command(tree: Tree, device: str) -> list[str]:
    """The command line of a testpmd with one AF_XDP device."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    plugins = [word for name in _PLUGINS for word in ("-d", tree.library(name))]
    return tree.command(
        "usr/bin/dpdk-testpmd",
        *("--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf"),
        *(f"--lcores=(0-1)@({cpus})", *plugins, "--vdev", device, "--"),
        *("--forward-mode=macswap", "--auto-start", f"--total-num-mbufs={_BUFFERS}", "--no-mlockall"),
    )
