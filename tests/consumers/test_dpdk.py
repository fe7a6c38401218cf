"""DPDK on a port: every frame comes back once and whole, however testpmd got hold of the port's map."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.consumers.consumer import START_TIME, Channel, Consumer, Port
from tests.consumers.dpdk import by_itself, command, hand_over, pinned_map
from tests.consumers.packages import FETCH_TIME, Tree
from tests.lab import mac_bytes, test_frame

FRAMES = 10_000
"""More than the buffers of testpmd's UMEM: each of them is used again."""
SIZES = range(60, 1515)

# An AF_XDP socket needs the first; the second is instead of a limit on locked memory above the usual
# 8 MiB; the third lets testpmd read its own files, wherever the checkout lies.
_CAPABILITIES = "-all,+net_raw,+ipc_lock,+dac_read_search"
_NO_MORE = [f"--{kind}={_CAPABILITIES}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
OWNER = ["--reuid=65534", "--regid=65534", "--clear-groups", *_NO_MORE]
STRANGER = ["--reuid=65533", *OWNER[1:]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(FETCH_TIME)]


def numbered_frames(port: Port) -> list[bytes]:
    """Numbered frames to the port, of all sizes."""
    return [
        test_frame(port.mac, port.far_mac, seq, size=SIZES[seq * 7 % len(SIZES)]) for seq in range(FRAMES)
    ]


def swapped(frame: bytes) -> bytes:
    return frame[6:12] + frame[:6] + frame[12:]


@pytest.mark.parametrize(
    ("device", "user"),
    [
        pytest.param(pinned_map, [], id="pinned-map"),
        pytest.param(hand_over, [], id="hand-over"),
        pytest.param(hand_over, OWNER, id="hand-over-unprivileged"),
        pytest.param(by_itself, [], id="by-itself"),
    ],
)
def test_every_frame_comes_back_once(
    port: Port, dpdk_tree: Tree, device: Callable[[Channel], str], user: list[str]
) -> None:
    frames = numbered_frames(port)
    with Consumer(port.channel, command(dpdk_tree, device(port.channel)), user) as consumer:
        port.wait_answered(consumer)
        back = port.echoed(frames)
        assert consumer.end() == 0
    assert sorted(back) == sorted(swapped(frame) for frame in frames)


def test_a_killed_one_leaves_the_port_to_the_next(port: Port, dpdk_tree: Tree) -> None:
    testpmd = command(dpdk_tree, pinned_map(port.channel))
    with Consumer(port.channel, testpmd) as consumer:
        port.wait_answered(consumer)
        consumer.process.kill()
        consumer.process.wait()
        with port.far.capture(port.device) as seen:
            sent = port.far.send(port.device, numbered_frames(port)[:100])
            seen.extra(sent)
            assert not seen.matching(lambda frame: frame[6:12] == mac_bytes(port.mac))
    with Consumer(port.channel, testpmd) as consumer:
        port.wait_answered(consumer)


def test_a_stranger_gets_no_map(port: Port, dpdk_tree: Tree) -> None:
    with Consumer(port.channel, command(dpdk_tree, hand_over(port.channel)), STRANGER) as consumer:
        assert consumer.process.wait(START_TIME) != 0
        assert "Failed to receive xskmap fd from AF_XDP Device Plugin" in consumer.said()
