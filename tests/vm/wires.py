"""Wires between emulated cards that QEMU itself does not have."""

from __future__ import annotations

from tests.lab import Lab, Namespace

MTU = 9216
"""What a wire carries; no card sends more."""


class TapWire(Lab):
    """Two taps in a namespace of their own; whatever is sent into one comes out of the other.

    QEMU's hubs carry one queue, and of its other back ends only taps and vhost-user have more
    (``net_init_tap`` in QEMU's ``net/tap.c``). ``fds`` has each end's queues as open files.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self.fds: list[list[int]] = []
        super().__init__()

    def add_nic(
        self, nic: str, wire_end: str, number: int = 0, queues: int = 4, host: Namespace | None = None
    ) -> None:
        self.fds = [self.tap(end, self._pairs, MTU).fds for end in (nic, wire_end)]
        for end, other in ((nic, wire_end), (wire_end, nic)):
            self.host.run("tc", "qdisc", "add", "dev", end, "clsact")
            everything = ("ingress", "protocol", "all", "u32", "match", "u32", "0", "0")
            to_the_other = ("action", "mirred", "egress", "redirect", "dev", other)
            self.host.run("tc", "filter", "add", "dev", end, *everything, *to_the_other)
