"""The RSS table, channels and steering rules of the Intel 82576, which has none, by its real driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload.errors import KernelError, UnsupportedError
from offload.kernel import ntuple, rss
from offload.kernel.ethtool import Ethtool
from offload.steering import spread_without
from tests.lab import wait_until
from tests.vm.inside.cards import Cards
from tests.vm.inside.igb import COUNT, QUEUES, arriving

SLOTS = 128


@pytest.fixture(scope="module")
def lab() -> Iterator[Cards]:
    """Two cards on a wire. Scope: one module."""
    with Cards("igb") as lab:
        yield lab


@pytest.fixture
def ethtool(lab: Cards) -> Iterator[Ethtool]:
    """Settings of the near card, whose RSS table is given back."""
    with Ethtool(lab.host.path) as ethtool:
        table = rss.spread(ethtool, lab.nic)
        yield ethtool
        rss.set_spread(ethtool, lab.nic, table)


def received(lab: Cards) -> list[int]:
    """How many frames of as many IP flows came to each queue, by the driver's own counters."""
    before = [lab.counter(f"rx_queue_{queue}_packets") for queue in QUEUES]
    found = [0, 0]

    def all_came() -> bool:
        found[:] = [lab.counter(f"rx_queue_{queue}_packets") - before[queue] for queue in QUEUES]
        return sum(found) >= COUNT

    lab.wire.send(lab.wire_end, arriving())
    wait_until(all_came, f"{COUNT} frames are counted")
    return found


def test_the_table_says_where_ip_goes(lab: Cards, ethtool: Ethtool) -> None:
    before = rss.spread(ethtool, lab.nic)
    assert len(before) == SLOTS
    assert {*before} == {*QUEUES}
    assert min(received(lab)) > 0, "flows go to both queues"
    for without, expected in (({1}, [COUNT, 0]), ({0}, [0, COUNT])):
        rss.set_spread(ethtool, lab.nic, spread_without(without, len(QUEUES), SLOTS))
        assert received(lab) == expected
    rss.set_spread(ethtool, lab.nic, before)
    assert rss.spread(ethtool, lab.nic) == before
    assert min(received(lab)) > 0
    assert rss.contexts(ethtool, lab.nic).state == "no"


def test_a_queue_that_the_card_does_not_have(lab: Cards, ethtool: Ethtool) -> None:
    before = rss.spread(ethtool, lab.nic)
    with pytest.raises(
        KernelError, match=rf"^{lab.nic}: cannot spread frames to the RX queues \[2\]: Invalid"
    ):
        rss.set_spread(ethtool, lab.nic, (2,) * SLOTS)
    assert rss.spread(ethtool, lab.nic) == before


def test_channels(lab: Cards, ethtool: Ethtool) -> None:
    """The kernel lowers them only when the table is nobody's: the driver's own that is given back is."""
    before, table = ethtool.channels(lab.nic), rss.spread(ethtool, lab.nic)
    assert (before.combined, before.other) == (2, 1)
    rss.set_spread(ethtool, lab.nic, spread_without({0}, 2, SLOTS))
    with pytest.raises(KernelError, match=rf"^{lab.nic}: cannot set its channels to combined 1: Invalid"):
        ethtool.set_channels(lab.nic, combined=1)
    rss.set_spread(ethtool, lab.nic, table)
    try:
        ethtool.set_channels(lab.nic, combined=1)
        assert ethtool.channels(lab.nic).combined == 1
        assert {*rss.spread(ethtool, lab.nic)} == {0}
    finally:
        ethtool.set_channels(lab.nic, combined=2)
        lab.wait_link()
    assert ethtool.channels(lab.nic) == before
    assert {*rss.spread(ethtool, lab.nic)} == {*QUEUES}


def test_it_has_no_steering_rules(lab: Cards, ethtool: Ethtool) -> None:
    """Its driver lists none instead of refusing to list them."""
    assert ntuple.rules(ethtool, lab.nic) == ()
    for answer in (ntuple.could_tell_without_trying(ethtool, lab.nic), ntuple.probe(ethtool, lab.nic)):
        assert (answer.state, answer.why) == ("no", "rx-ntuple-filter is off, and fixed")
    with pytest.raises(UnsupportedError, match=r"to RX queue 1: .*its driver takes no such rule"):
        ntuple.insert(ethtool, lab.nic, "02:15:5d:00:00:01", None, 1)
