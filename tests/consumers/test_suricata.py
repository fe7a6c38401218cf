"""Suricata on a port sees every datagram once. It takes no map: its libxdp must know the program there."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.consumers.consumer import Consumer, Port
from tests.consumers.packages import FETCH_TIME, Tree
from tests.lab import udp4

HERE = Path(__file__).parent
DATAGRAMS = 1000
"""Half of what its ring takes."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(FETCH_TIME)]


def payload(number: int) -> bytes:
    return b"offl %06d" % number


def test_every_datagram_is_seen_once(port: Port, suricata_tree: Tree, tmp_path: Path) -> None:
    events = tmp_path / "eve.json"

    def alerts() -> list[bytes]:
        written = events.read_text()
        whole = written[: written.rfind("\n") + 1].splitlines()  # the last line may be half written
        return [base64.b64decode(json.loads(line)["payload"]) for line in whole]

    datagrams = [
        udp4(port.mac, port.far_mac, "192.0.2.11", "192.0.2.1", payload(number))
        for number in range(DATAGRAMS)
    ]
    command = suricata_tree.command(
        "usr/bin/suricata",
        *("-c", str(HERE / "suricata.yaml"), "-S", str(HERE / "suricata.rules"), "-l", str(tmp_path)),
        f"--af-xdp={port.channel.ifname}",
    )
    with Consumer(port.channel, command) as consumer:
        consumer.wait_for(lambda: "Engine started" in consumer.said(), "suricata is ready")
        port.far.send(port.device, datagrams)
        consumer.wait_for(lambda: len(alerts()) >= DATAGRAMS, "suricata has seen all")
        assert consumer.end() == 0
    assert sorted(alerts()) == [payload(number) for number in range(DATAGRAMS)]
