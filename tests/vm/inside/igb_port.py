"""An AF_XDP port that has sockets on both queues of the Intel 82576, by its real driver, with a daemon.

The sockets are handed over, without a TX ring, where the kernel lets others use a bound one (Linux 6.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from offload import xsk
from offload.channels import INNER
from offload.kernel.xskdiag import listed
from offload.xsk import handed
from tests.instance import Instance
from tests.lab import HANDED_OVER_SINCE, VERSION, WIRE_MAC, Vm, test_frame, udp4
from tests.netns.consumer import Consumer
from tests.vm.inside.cards import Cards
from tests.vm.inside.igb import COUNT, QUEUES, ZERO_COPY_SINCE, needs_zero_copy, silent, take

pytestmark = pytest.mark.timeout(300)

DB1, WEB1 = "02:15:5d:00:00:01", "02:15:5d:00:00:03"
BROADCAST = "ff:ff:ff:ff:ff:ff"
FEW = 1024
RINGS = xsk.RingSizes(rx=512, tx=64)


@dataclass(frozen=True)
class Site:
    lab: Cards
    instance: Instance
    web1: Vm

    def from_wire(self, mac: str) -> list[bytes]:
        """Frames of several IP flows, which RSS spreads as it was told to."""
        sent = [
            udp4(mac, WIRE_MAC, "192.0.2.1", f"192.0.2.{2 + number}", b"%64d" % number)
            for number in range(COUNT)
        ]
        self.lab.wire.send(self.lab.wire_end, sent)
        return sent

    @contextmanager
    def sockets(self) -> Iterator[list[xsk.Socket]]:
        """A socket on each queue: handed over by the daemon, or made here and put into the pinned map."""
        if VERSION < HANDED_OVER_SINCE:
            with ExitStack() as held:
                own = [Consumer(self.instance, "db1", queue=queue, rings=RINGS) for queue in QUEUES]
                yield [held.enter_context(each).socket for each in own]
            return
        with (
            handed.connect(self.instance.paths.hand_over("db1"), timeout=60) as provider,
            ExitStack() as held,
        ):
            bound = [provider.socket(self.lab.nic, queue, FEW) for queue in QUEUES]
            yield [held.enter_context(xsk.Socket(held.enter_context(each))) for each in bound]

    def shown(self) -> list[dict[str, Any]]:
        return [one for one in self.instance.port("db1")["af_xdp"]["channels"] if one["kind"] == "hardware"]


def config_of(nic: str, zero_copy: str) -> dict[str, Any]:
    af_xdp = {"mode": "hardware", "zero_copy": zero_copy}
    return {
        "version": 1,
        "metrics": None,
        "nics": {nic: {}},
        "switches": {"ext0": {"type": "external", "uplink": nic}},
        "ports": {
            "db1": {"switch": "ext0", "mac": DB1, "af_xdp": af_xdp},
            "web1": {"switch": "ext0", "mac": WEB1, "device": "web1"},
        },
    }


@pytest.fixture
def lab() -> Iterator[Cards]:
    """Two cards on a wire. Scope: one test."""
    with Cards("igb") as lab:
        yield lab


@pytest.mark.parametrize("zero_copy", ["auto", "off", pytest.param("require", marks=needs_zero_copy)])
def test_both_queues_are_the_port_s(lab: Cards, zero_copy: str) -> None:
    web1 = lab.vm("web1", WEB1)
    with Instance(lab.host, config_of(lab.nic, zero_copy)) as instance:
        site = Site(lab, instance, web1)
        instance.start()
        lab.wait_link()
        instance.hear(web1)
        with Consumer(instance, "db1") as soft:
            soft.announce(DB1)
            instance.wait_heard(DB1)
            wanted = zero_copy != "off" and VERSION >= ZERO_COPY_SINCE
            with site.sockets() as found:
                lab.wait_link()
                assert [socket.zero_copy for socket in found] == [wanted] * 2
                # Debian's 6.1 lists no AF_XDP sockets, so that the daemon cannot tell.
                told = None if VERSION < HANDED_OVER_SINCE and listed() is None else wanted
                assert [one["zero_copy"] for one in site.shown()] == [told] * 2
                assert all(one["consumer"] for one in site.shown())
                check_paths(site, found, soft)
            lab.wait_link()
            assert [one["consumer"] for one in site.shown()] == [None] * 2
            # Nobody is there any more: the same frames come by the veth pair.
            sent = site.from_wire(DB1)
            assert sorted(soft.expect(COUNT, seconds=20)) == sorted(sent)


def check_paths(site: Site, found: list[xsk.Socket], soft: Consumer) -> None:
    """Each port's frames come to it and to nobody else, in whichever queue they arrive."""
    for queue, other in ((0, 1), (1, 0)):
        site.lab.receive_on(queue)
        sent = site.from_wire(DB1)
        assert sorted(take(found[queue], COUNT)) == sorted(sent)
        assert silent(found[other])
        assert soft.take() == []
        with site.web1.capture() as web1:
            sent = site.from_wire(WEB1)
            assert sorted(web1.wait_for(COUNT, timeout=20)) == sorted(sent)
        assert silent(found[queue])
        assert silent(found[other])
    to_all = [test_frame(BROADCAST, WIRE_MAC, number) for number in range(COUNT)]
    site.lab.wire.send(site.lab.wire_end, to_all)
    assert sorted(soft.expect(COUNT, seconds=20)) == sorted(to_all)
    assert all(silent(socket) for socket in found)


@pytest.mark.skipif(VERSION >= HANDED_OVER_SINCE, reason="sockets are handed over since Linux 6.4")
def test_handing_over_is_refused_where_it_cannot_be(lab: Cards) -> None:
    lab.vm("web1", WEB1)
    with Instance(lab.host, config_of(lab.nic, "auto")) as instance:
        instance.start()
        door = instance.paths.hand_over("db1")
        with handed.connect(door, timeout=60) as provider, pytest.raises(handed.RefusedError) as refusal:
            provider.socket(INNER)
        assert "Linux 6.4 does" in str(refusal.value)


@pytest.mark.skipif(VERSION >= ZERO_COPY_SINCE, reason="igb has zero copy since Linux 6.14")
def test_zero_copy_that_is_required_is_refused(lab: Cards) -> None:
    lab.vm("web1", WEB1)
    with Instance(lab.host, config_of(lab.nic, "require")) as instance:
        refused = instance.cli("plan", str(instance.file), check=False)
        assert refused.returncode == 3
        assert f"the driver of {lab.nic} has no zero copy" in refused.stderr
