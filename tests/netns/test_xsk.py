"""offload.xsk on veth pairs: frames arrive, losses are counted, sockets are handed over, the tools work."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from scapy.utils import RawPcapReader

from offload import xsk
from offload.xsk import abi
from tests.lab import (
    AS_NOBODY,
    HANDED_OVER_SINCE,
    NIC_MAC,
    QUIET,
    VERSION,
    WIRE_MAC,
    Lab,
    handed_over,
    mac_bytes,
    seq_of,
    test_frame,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
NIC = "eth1"
SHAPE = xsk.UmemShape(frames=128)
RINGS = xsk.RingSizes(rx=64, tx=64)


def arriving(count: int, first: int = 0, size: int = 60) -> list[bytes]:
    """Frames for the NIC, of different lengths from ``size`` on."""
    return [test_frame(NIC_MAC, WIRE_MAC, seq, size=size + seq % 100) for seq in range(first, first + count)]


@pytest.fixture
def one(make_lab: Callable[..., Lab]) -> Lab:
    """A laboratory whose NIC has one queue. Scope: one test."""
    return make_lab(queues=1)


@contextmanager
def opened(lab: Lab, umem: xsk.Umem | None = None, **settings: object) -> Iterator[xsk.Socket]:
    """A socket of the NIC's queue, with a program, and the rings and the UMEM of this file."""
    options = {"rings": RINGS} | settings
    with ExitStack() as held:
        memory = umem or held.enter_context(xsk.Umem(SHAPE))
        redirect = held.enter_context(lab.host.call(lambda: xsk.Redirect(NIC, "native")))
        bound = lab.host.call(lambda: xsk.BoundSocket.bind(memory, NIC, **options))  # type: ignore[arg-type]
        found = held.enter_context(xsk.Socket(bound))
        redirect.map.insert(0, bound)
        yield found


def received(sock: xsk.Socket, count: int, batch: int = 64) -> list[bytes]:
    """The next ``count`` frames; AssertionError when they do not come."""
    frames: list[bytes] = []
    while len(frames) < count:
        with sock.receive(batch, timeout=5) as found:
            assert found, f"{len(frames)} of {count} frames came"
            frames += [bytes(frame) for frame in found]
    return frames


def nothing_more(sock: xsk.Socket) -> None:
    with sock.receive(timeout=QUIET) as batch:
        assert len(batch) == 0


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_every_frame_arrives_as_it_was_sent(one: Lab, mode: xsk.Mode) -> None:
    frames = arriving(500)
    with one.host.call(lambda: xsk.Socket.open(NIC, mode=mode)) as sock:
        assert not sock.zero_copy
        one.wire.send("wire0", frames)
        assert received(sock, 500) == frames
        nothing_more(sock)
        assert sock.statistics().rx_ring_full == 0


def test_order_and_content_hold_while_rings_and_chunks_go_round_many_times(one: Lab) -> None:
    with opened(one) as sock:
        for first in range(0, 20_000, 50):
            frames = arriving(50, first)
            one.wire.send("wire0", frames)
            assert received(sock, 50, batch=7 + first % 40) == frames
        assert sock.frames.free + 64 == 128, "64 chunks are for the kernel to receive into, the others free"
        assert set(vars(sock.statistics()).values()) - {sock.statistics().tx_ring_empty_descs} <= {0}


def test_frames_of_an_unaligned_umem_with_headroom(one: Lab) -> None:
    shape = xsk.UmemShape(frames=100, chunk_size=3000, headroom=33, unaligned=True)
    with xsk.Umem(shape) as umem, opened(one, umem) as sock:
        for first in range(0, 1000, 50):
            one.wire.send("wire0", frames := arriving(50, first, size=1000))
            assert received(sock, 50) == frames
        with one.wire.capture("wire0") as seen:
            sock.send(frames)
            assert seen.wait_for(50) == frames
            one.wire.send("wire0", frames)
            moved = 0
            while moved < 50:
                moved += sock.relay(sock)
            assert seen.wait_for(100) == frames * 2
            assert sock.drain(5)
        sock.refill()
        assert set((sock.frames.take(50) % 3000).tolist()) == {0}


def test_huge_pages_where_the_host_has_them(one: Lab) -> None:
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "HugePages_Free" in line)
    if int(free.split()[1]) < 1:
        with pytest.raises(xsk.LimitError, match=r"vm\.nr_hugepages"):
            xsk.Umem(SHAPE, huge_pages=True)
        return
    with xsk.Umem(SHAPE, huge_pages=True) as umem, opened(one, umem) as sock:
        one.wire.send("wire0", frames := arriving(50))
        assert received(sock, 50) == frames


def test_sending_is_in_order_and_gives_every_chunk_back(one: Lab) -> None:
    with opened(one) as sock, one.wire.capture("wire0") as seen:
        frames = arriving(5000)
        assert sock.send(frames) == 5000
        assert seen.wait_for(5000) == frames
        assert sock.drain(5)
        assert sock.frames.free == 64
        with pytest.raises(ValueError, match="2049 bytes: 1 to 2048"):
            sock.send([bytes(2049)])


def test_what_was_received_is_sent_from_where_it_is(one: Lab) -> None:
    with opened(one) as sock, one.wire.capture("wire0") as seen:
        one.wire.send("wire0", frames := arriving(50))
        with sock.receive(timeout=5) as batch:
            taken = len(batch)
            assert sock.transmit(batch)
        assert seen.wait_for(taken) == frames[:taken]
        while taken < 50:
            taken += sock.relay(sock)
        assert seen.wait_for(50) == frames
        assert sock.drain(5)
        sock.refill()
        assert sock.frames.free == 64


def test_a_socket_that_waits_to_be_woken_is_woken_by_kick_alone(one: Lab) -> None:
    with opened(one) as sock, one.wire.capture("wire0") as seen:
        (address,) = sock.frames.take(1).tolist()
        sock.frames.memory[address : address + 60] = arriving(1)[0]
        assert sock.tx is not None
        sock.tx.reserve(1)[:] = [(address, 60, 0)]
        sock.tx.submit(1)
        assert sock.tx.needs_wakeup
        seen.assert_silent()
        sock.kick()
        assert seen.wait_for(1) == arriving(1)


def test_a_socket_without_need_wakeup_sends_too(one: Lab) -> None:
    with opened(one, need_wakeup=False) as sock, one.wire.capture("wire0") as seen:
        sock.send(frames := arriving(200))
        assert seen.wait_for(200) == frames


def test_frames_longer_than_a_chunk(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(queues=1, mtu=9000)
    try:
        with opened(lab, multi_buffer=True) as sock:
            jumbo = [test_frame(NIC_MAC, WIRE_MAC, seq, size=60 + seq * 300) for seq in range(30)]
            lab.wire.send("wire0", jumbo[:10])
            lab.wire.send("wire0", jumbo[10:20])
            assert received(sock, 20, batch=3) == jumbo[:20]
            with lab.wire.capture("wire0") as seen:
                assert sock.send(jumbo) == 30
                assert seen.wait_for(30) == jumbo
            assert sock.drain(5)
            assert sock.frames.free == 64
    except xsk.XskError as error:
        if VERSION >= (6, 6):
            raise
        pytest.skip(str(error))


def test_losses_are_counted_to_the_frame(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(queues=1, mtu=3000)
    with opened(lab, rings=xsk.RingSizes(rx=32, tx=32)) as sock:
        lab.wire.send("wire0", arriving(100))
        wait_until(lambda: sock.statistics().rx_ring_full == 68, "68 of 100 frames found the RX ring full")
        assert [seq_of(frame) for frame in received(sock, 32)] == list(range(32))
        lab.wire.send("wire0", arriving(3, size=2500))
        wait_until(lambda: sock.statistics().rx_dropped == 3, "3 frames were too long for a chunk")
        assert sock.tx is not None
        sock.tx.reserve(2)[:] = [(1 << 40, 60, 0), (0, 60, 0x80)]
        sock.tx.submit(2)
        sock.kick()
        sock.kick()  # the kernel stops at each
        assert sock.statistics().tx_invalid_descs == 2
        nothing_more(sock)


def test_frames_that_find_no_chunk_are_counted(one: Lab) -> None:
    with opened(one) as sock:
        held = sock.receive(timeout=0)
        one.wire.send("wire0", arriving(40))
        held = sock.receive(timeout=5)
        while len(held) < 40:
            with sock.receive(timeout=5) as more:
                held = xsk.Batch(sock.frames, np.concatenate((held.hand_over(), more.hand_over())))
        sock.rx_chunks = 0  # so that the kernel has those 24 only that it has now
        one.wire.send("wire0", arriving(40))
        wait_until(lambda: sock.statistics().rx_fill_ring_empty_descs > 0, "frames found no chunk")
        held.close()


def test_a_socket_without_a_tx_ring_receives_and_can_never_send(one: Lab) -> None:
    with opened(one, rings=xsk.RingSizes(rx=64, tx=0)) as sock:
        one.wire.send("wire0", frames := arriving(100)[:60])
        assert received(sock, 60) == frames
        with pytest.raises(ValueError, match="without a TX ring"):
            sock.send(frames)
        raw = socket.socket(abi.AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(sock.fileno()))
        with raw, pytest.raises(OSError, match="busy"):
            raw.setsockopt(abi.SOL_XDP, abi.XDP_TX_RING, 64)


def test_a_socket_without_an_rx_ring_sends_and_is_in_no_map(one: Lab) -> None:
    bound = one.host.call(lambda: xsk.BoundSocket.bind(xsk.Umem(SHAPE), NIC, rings=xsk.RingSizes(0, 64)))
    with xsk.Socket(bound) as sock, one.wire.capture("wire0") as seen:
        sock.send(frames := arriving(200))
        assert seen.wait_for(200) == frames
        with pytest.raises(ValueError, match="without an RX ring"):
            sock.receive()


def test_two_devices_share_a_umem_and_frames_go_through_without_a_copy(one: Lab) -> None:
    vm = one.vm("web1", mac="02:15:5d:00:00:01")
    rings = xsk.RingSizes(rx=64, tx=0)
    with xsk.Umem(SHAPE) as umem, opened(one, umem, rings=rings) as source, vm.capture() as seen:
        bound = one.host.call(lambda: xsk.BoundSocket.bind(umem, "web1", rings=xsk.RingSizes(0, 64)))
        with xsk.Socket(bound, source.frames) as sink:
            for first in range(0, 2000, 40):
                one.wire.send("wire0", arriving(40, first))
                moved = 0
                while moved < 40:
                    source.wait(5)
                    moved += sink.relay(source)
            assert seen.wait_for(2000) == arriving(2000)
            assert sink.drain(5)


def test_frames_go_from_one_umem_to_another(one: Lab) -> None:
    vm = one.vm("web1", mac="02:15:5d:00:00:01")
    shape = xsk.UmemShape(frames=100, chunk_size=3000, unaligned=True)
    with opened(one) as source, xsk.Umem(shape) as umem, vm.capture() as seen:
        rings = xsk.RingSizes(rx=0, tx=32)
        bound = one.host.call(lambda: xsk.BoundSocket.bind(umem, "web1", rings=rings))
        with xsk.Socket(bound) as sink:
            for first in range(0, 2000, 40):
                one.wire.send("wire0", arriving(40, first))
                moved = 0
                while moved < 40:
                    source.wait(5)
                    moved += sink.relay(source)
            assert seen.wait_for(2000) == arriving(2000)
            assert sink.drain(5)
            assert (sink.frames.free, source.frames.free) == (100, 64)


def test_frames_are_received_while_other_tasks_run(one: Lab) -> None:
    async def receive(sock: xsk.Socket) -> tuple[list[int | None], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        other = asyncio.create_task(tick())
        sequence: list[int | None] = []
        waiting = xsk.AsyncSocket(sock)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await waiting.receive()
        one.wire.send("wire0", arriving(50))
        async for batch in waiting:
            sequence += [seq_of(bytes(frame)) for frame in batch]
            if len(sequence) == 50:
                break
        other.cancel()
        held = sock.frames.take(128)
        sending = asyncio.create_task(waiting.send(arriving(1000)))
        await asyncio.sleep(0.05)
        assert not sending.done(), "there is no chunk to send from"
        sock.frames.give(held)
        await sending
        return sequence, ticks

    with opened(one) as sock, one.wire.capture("wire0") as seen:
        sequence, ticks = asyncio.run(receive(sock))
        assert sequence == list(range(50))
        assert ticks >= 5
        assert seen.wait_for(1000) == arriving(1000)


def test_a_device_that_goes_is_told_to_who_waits(one: Lab) -> None:
    with opened(one) as sock:
        one.host.ip(f"link delete {NIC}")
        with pytest.raises(xsk.DeviceError, match=f"{NIC}.*is gone"):
            sock.receive(timeout=5)
        with pytest.raises(xsk.DeviceError, match=f"{NIC}.*is gone"):
            asyncio.run(xsk.AsyncSocket(sock).receive())
        with pytest.raises(xsk.DeviceError, match=f"{NIC}.*is gone"):
            sock.send(arriving(1))


def test_a_closed_socket_frees_its_queue_whatever_is_still_looked_at(one: Lab) -> None:
    with opened(one) as sock:
        one.wire.send("wire0", arriving(1))
        batch = sock.receive(timeout=5)
        (frame,) = batch
        assert sock.rx is not None
        view = sock.rx.entries
        sock.close()
        sock.close()
        one.host.call(lambda: xsk.BoundSocket.bind(xsk.Umem(SHAPE), NIC)).close()
        assert bytes(frame) == arriving(1)[0]
        assert not view["len"].any()


def test_a_queue_that_has_an_owner_is_refused_by_name(one: Lab) -> None:
    with opened(one):
        began = time.monotonic()
        with pytest.raises(xsk.BusyError, match=f"queue 0 of {NIC}.*already has an owner") as refusal:
            one.host.call(lambda: xsk.BoundSocket.bind(xsk.Umem(SHAPE), NIC, patience=0.2))
        assert time.monotonic() - began >= 0.2
        assert (refusal.value.device, refusal.value.queue) == (NIC, 0)


def test_a_program_that_is_there_is_left_alone(one: Lab) -> None:
    with opened(one) as sock:
        for mode in ("native", "generic"):
            with pytest.raises(xsk.BusyError, match=f"{NIC} in {mode} mode.*left alone"):
                one.host.call(lambda mode=mode: xsk.Redirect(NIC, mode))  # type: ignore[misc]
        one.wire.send("wire0", arriving(1))
        assert received(sock, 1) == arriving(1)


@pytest.mark.parametrize(
    ("device", "settings", "error", "words"),
    [
        ("nothing0", {}, xsk.DeviceError, "no such device"),
        (NIC, {"queue": 1}, xsk.XskError, "no such queue"),
        (NIC, {"copy": "zero-copy"}, xsk.UnsupportedError, "no zero copy"),
    ],
    ids=["device", "queue", "zero copy"],
)
def test_what_cannot_be_bound_is_refused_with_the_reason(
    one: Lab, device: str, settings: dict[str, object], error: type[xsk.XskError], words: str
) -> None:
    with pytest.raises(error, match=f"(?i){words}"):
        one.host.call(lambda: xsk.BoundSocket.bind(xsk.Umem(SHAPE), device, **settings))  # type: ignore[arg-type]


def test_frames_without_a_socket_go_on_to_the_stack(one: Lab) -> None:
    with (
        one.host.call(lambda: xsk.Redirect(NIC, "native")) as redirect,
        one.host.capture(NIC) as stack,
        one.host.call(lambda: xsk.BoundSocket.bind(xsk.Umem(SHAPE), NIC)) as bound,
        xsk.Socket(bound) as sock,
    ):
        one.wire.send("wire0", arriving(5))
        assert stack.wait_for(5) == arriving(5)
        redirect.map.insert(0, bound)
        one.wire.send("wire0", arriving(5, 5))
        assert received(sock, 5) == arriving(5, 5)
        redirect.map.remove(0)
        redirect.map.remove(0)
        one.wire.send("wire0", arriving(5, 10))
        assert stack.wait_for(10) == arriving(5) + arriving(5, 10)
        with pytest.raises(xsk.XskError, match=r"entry 64.*fewer entries"):
            redirect.map.insert(64, bound)


@handed_over
def test_a_socket_handed_over_serves_a_process_without_privileges(one: Lab) -> None:
    with ExitStack() as held:
        umem = held.enter_context(xsk.Umem(SHAPE))
        redirect = held.enter_context(one.host.call(lambda: xsk.Redirect(NIC, "native")))
        rings = xsk.RingSizes(rx=64, tx=0)
        bound = held.enter_context(one.host.call(lambda: xsk.BoundSocket.bind(umem, NIC, rings=rings)))
        redirect.map.insert(0, bound)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        held.enter_context(ours)
        argv = [*AS_NOBODY, sys.executable, "-m", "tests.netns.xsk_receiver", str(theirs.fileno()), "500"]
        process = held.enter_context(subprocess.Popen(argv, pass_fds=[theirs.fileno()], cwd=ROOT))
        held.callback(process.kill)
        theirs.close()
        ours.settimeout(10)
        document = json.dumps(bound.particulars.document()).encode()
        socket.send_fds(ours, [document], [bound.fileno(), umem.fd])
        capabilities, *refused = json.loads(ours.recv(65536))
        assert int(capabilities, 16) & ~(1 << 2) == 0, "it may read files, which is CAP_DAC_READ_SEARCH, only"
        assert refused == ["PrivilegeError", "OSError", "ValueError"]
        for first in range(0, 500, 50):
            one.wire.send("wire0", frames := arriving(50, first))
            assert [ours.recv(65536) for _ in frames] == frames
        assert process.wait(5) == 0
        assert bound.statistics().rx_ring_full == 0
        with pytest.raises(ValueError, match="used before"):
            xsk.Socket(bound)


@handed_over
def test_who_made_a_socket_sees_how_full_its_rings_are(one: Lab) -> None:
    with opened(one) as sock:
        watching = xsk.BoundSocket.adopt(os.dup(sock.fileno()), sock.bound.umem, sock.bound.particulars)
        with watching:
            assert watching.rx is not None
            assert watching.fill.filled == 64
            one.wire.send("wire0", arriving(10))
            wait_until(lambda: watching.rx is not None and watching.rx.filled == 10, "10 frames wait")
            assert watching.fill.filled == 54
            received(sock, 10)
            assert watching.rx.filled == 0


@pytest.mark.skipif(VERSION >= HANDED_OVER_SINCE, reason="sockets are handed over since Linux 6.4")
def test_an_old_kernel_s_refusal_is_explained(one: Lab) -> None:
    with opened(one) as sock, pytest.raises(xsk.BusyError, match=r"Before Linux 6\.4"):
        xsk.BoundSocket.adopt(os.dup(sock.fileno()), sock.bound.umem, sock.bound.particulars)


def test_only_an_af_xdp_socket_is_adopted(one: Lab) -> None:
    with opened(one) as sock, socket.socket() as other:
        fd = os.dup(other.fileno())
        with pytest.raises(xsk.UnsupportedError, match="not an AF_XDP socket"):
            xsk.BoundSocket.adopt(fd, sock.bound.umem, sock.bound.particulars)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


class Tool:
    """``python -m offload.xsk`` in a laboratory's host namespace, ready for frames; ended by leaving."""

    def __init__(self, lab: Lab, *arguments: str, within: Sequence[str] = ()) -> None:
        argv = (*within, sys.executable, "-m", "offload.xsk", *arguments)
        self._process = subprocess.Popen(
            lab.host.argv(*argv), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        self.first = self._process.stderr.readline().decode()

    def end(self, by: signal.Signals | None = None) -> tuple[int, bytes, str]:
        """Exit code and output, of a tool that ends by itself or by this signal."""
        if by is not None:
            self._process.send_signal(by)
        out, err = self._process.communicate(timeout=10)
        return self._process.returncode, out, err.decode()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


MULTI_BUFFER = pytest.param(
    ["--multi-buffer"],
    marks=pytest.mark.skipif(VERSION < (6, 6), reason="this kernel has no multi-buffer sockets"),
)


@pytest.mark.parametrize("options", [[], ["--busy-poll"], MULTI_BUFFER, ["--spin", "0"]], ids=str)
def test_drop_counts(one: Lab, options: list[str]) -> None:
    with Tool(one, "drop", "-d", NIC, "--mode", "native", "--count", "300", "--json", *options) as tool:
        assert tool.first == "offload.xsk: ready\n"
        one.wire.send("wire0", arriving(300))
        code, out, _ = tool.end()
    document = json.loads(out)
    assert code == 0
    assert document["frames"] == 300
    assert document["sent"] is None
    assert document["zero_copy"] is False
    assert set(document["lost"]) >= {"rx_ring_full", "rx_dropped"}


def test_a_tool_ended_by_a_signal_says_what_it_did_and_leaves_nothing(one: Lab) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with Tool(one, "drop", "-d", NIC, "--mode", "generic") as tool:
            one.wire.send("wire0", arriving(20))
            wait_until(lambda: "xdp" in one.host.ip(f"link show {NIC}"), "the program is there")
            time.sleep(QUIET)
            code, _, err = tool.end(number)
        assert code == 0
        assert err.startswith("20 frames in ")
        assert "copy; lost: none" in err
        assert "xdp" not in one.host.ip(f"link show {NIC}")


def test_dump_shows_a_line_for_each_frame(one: Lab) -> None:
    with Tool(one, "dump", "-d", NIC, "--mode", "native", "--count", "2", "--hex") as tool:
        one.wire.send("wire0", frames := arriving(2))
        code, out, _ = tool.end()
    assert code == 0
    for line, frame in zip(out.decode().splitlines(), frames, strict=True):
        _, *words = line.split()
        assert words == [WIRE_MAC, ">", NIC_MAC, "0x88b5", str(len(frame)), frame.hex()]


@pytest.mark.parametrize("target", ["-", "file"])
def test_dump_writes_a_capture_that_others_read(one: Lab, tmp_path: Path, target: str) -> None:
    file = tmp_path / "seen.pcap"
    where = "-" if target == "-" else str(file)
    with Tool(one, "dump", "-d", NIC, "--mode", "native", "--count", "50", "--write", where) as tool:
        one.wire.send("wire0", frames := arriving(50))
        code, out, _ = tool.end()
    assert code == 0
    if target == "-":
        file.write_bytes(out)
    with RawPcapReader(str(file)) as reader:
        assert [data for data, _ in reader] == frames


def test_echo_sends_frames_back_with_their_macs_swapped(one: Lab) -> None:
    frames = arriving(500)
    with (
        Tool(one, "echo", "-d", NIC, "--mode", "native", "--count", "500", "--json") as tool,
        one.wire.capture("wire0") as seen,
    ):
        one.wire.send("wire0", frames)
        answers = seen.wait_for(500)
        code, out, _ = tool.end()
    there, back = mac_bytes(NIC_MAC), mac_bytes(WIRE_MAC)
    assert answers == [back + there + frame[12:] for frame in frames]
    assert (code, json.loads(out)["sent"]) == (0, 500)


def test_forward_sends_frames_out_of_the_other_device(one: Lab) -> None:
    vm = one.vm("web1", mac="02:15:5d:00:00:01")
    with (
        Tool(one, "forward", "-d", NIC, "--mode", "native", "--to", "web1", "--json") as tool,
        vm.capture() as seen,
    ):
        one.wire.send("wire0", frames := arriving(3000))
        assert seen.wait_for(3000) == frames
        code, out, _ = tool.end(signal.SIGINT)
    assert (code, json.loads(out)["frames"]) == (0, 3000)


def test_a_tool_uses_a_pinned_map_and_leaves_its_place_empty(one: Lab) -> None:
    pin = Path("/sys/fs/bpf", one.host.name)
    with ExitStack() as held:
        redirect = held.enter_context(one.host.call(lambda: xsk.Redirect(NIC, "native")))
        redirect.map.pin(pin)
        held.callback(pin.unlink)
        stack = held.enter_context(one.host.capture(NIC))
        with Tool(one, "drop", "-d", NIC, "--map", str(pin), "--count", "30", "--json") as tool:
            one.wire.send("wire0", arriving(30))
            assert json.loads(tool.end()[1])["frames"] == 30
        one.wire.send("wire0", arriving(3))
        assert stack.wait_for(3) == arriving(3)
        with Tool(one, "drop", "-d", NIC, "--map", str(pin), "--index", "64") as tool:
            assert "entry 64 of the XSKMAP" in tool.first
            assert tool.end()[0] == 1


def test_a_tool_that_cannot_says_why(one: Lab, tmp_path: Path) -> None:
    drop = ("drop", "-d", NIC, "--mode", "native")
    with opened(one), Tool(one, *drop) as tool:
        assert "already has an XDP program" in tool.first
        assert tool.end()[0] == 1
    with Tool(one, *drop, within=AS_NOBODY) as tool:
        assert "CAP_BPF" in tool.first
        assert tool.end()[0] == 4
    with Tool(one, *drop, "--zero-copy") as tool:
        assert "no zero copy" in tool.first
        assert tool.end()[0] == 3
    with Tool(one, "drop", "-d", NIC, "--map", str(tmp_path / "none")) as tool:
        assert "Nothing is pinned there" in tool.first
        assert tool.end()[0] == 1
