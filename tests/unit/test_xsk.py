"""offload.xsk without a kernel's socket: rings in plain memory, chunks, refusals, and what is imported."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from offload import xsk
from offload.xsk import abi
from offload.xsk.__main__ import main
from offload.xsk.errors import ENOTSUPP, explain
from offload.xsk.pcap import Writer
from offload.xsk.ringmap import RingMap
from offload.xsk.rings import ADDRESS, DESCRIPTOR

ROOT = Path(__file__).resolve().parents[2]
FIELDS = (0, 64, 320, 128)
"""Where a ring's producer, consumer, entries and flags are, as Linux lays them out."""
SIZE = 8
NEARLY = 2**32 - 3


class Shared:
    """A ring in a memfd in the kernel's place: two sides of it, and its words."""

    def __init__(self, entry: int, index: int = 0) -> None:
        fd = os.memfd_create("ring")
        try:
            os.ftruncate(fd, 4096)
            self.ours, self.theirs = (RingMap(fd, 0, FIELDS, SIZE, entry) for _ in range(2))
        finally:
            os.close(fd)
        self.theirs.producer.value = self.theirs.consumer.value = index


@pytest.fixture
def addresses() -> Iterator[tuple[xsk.ProducerRing, xsk.ConsumerRing, Shared]]:
    """A ring of addresses whose indices are about to begin from 0 again. Scope: one test."""
    shared = Shared(8, NEARLY)
    yield xsk.ProducerRing(shared.ours, ADDRESS), xsk.ConsumerRing(shared.theirs, ADDRESS), shared
    shared.ours.close()
    shared.theirs.close()


@given(
    index=st.sampled_from([0, 5, NEARLY, 2**32 - SIZE, 2**31 - 1]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, SIZE + 2)), max_size=60),
)
def test_a_ring_keeps_order_and_count_past_its_end_and_past_the_last_index(
    index: int, steps: list[tuple[bool, int]]
) -> None:
    shared = Shared(8, index)
    writer, reader = xsk.ProducerRing(shared.ours, ADDRESS), xsk.ConsumerRing(shared.theirs, ADDRESS)
    written = read = 0
    for writes, count in steps:
        if writes:
            put = writer.put(np.arange(written, written + count, dtype=ADDRESS))
            assert put == min(count, SIZE - (written - read))
            written += put
        else:
            found = reader.take(count).view(ADDRESS).tolist()
            assert found == list(range(read, min(read + count, written)))
            read += len(found)
        assert shared.ours.filled == written - read
    assert shared.ours.producer.value == (index + written) % 2**32
    assert shared.ours.consumer.value == (index + read) % 2**32


def test_views_are_the_rings_memory_and_end_at_its_end(
    addresses: tuple[xsk.ProducerRing, xsk.ConsumerRing, Shared],
) -> None:
    writer, reader, _ = addresses
    first = writer.reserve(6)
    assert len(first) == 3, "from 2**32 - 3 there are three places to the end"
    first[:] = [7, 8, 9]
    assert len(reader.peek(6)) == 0, "nothing was submitted yet"
    writer.submit(3)
    assert reader.peek(6).tolist() == [7, 8, 9]
    first[0] = 70
    assert reader.peek(1).tolist() == [70], "a view is no copy"
    reader.release(3)
    writer.put(np.array([10], ADDRESS))
    assert reader.peek(6).tolist() == [10]


def test_no_more_is_given_back_than_was_there(
    addresses: tuple[xsk.ProducerRing, xsk.ConsumerRing, Shared],
) -> None:
    writer, reader, _ = addresses
    with pytest.raises(ValueError, match="not free"):
        writer.submit(SIZE + 1)
    with pytest.raises(ValueError, match="not available"):
        reader.release(1)
    assert writer.put(np.zeros(SIZE + 1, ADDRESS)) == SIZE
    assert writer.put(np.zeros(1, ADDRESS)) == 0


def test_the_other_sides_index_is_read_only_when_too_little_is_known(
    addresses: tuple[xsk.ProducerRing, xsk.ConsumerRing, Shared],
) -> None:
    writer, reader, _ = addresses
    writer.put(np.zeros(2, ADDRESS))
    assert reader.available() == 2
    writer.put(np.zeros(2, ADDRESS))
    assert reader.available(2) == 2
    assert reader.available(3) == 4


def test_a_ring_tells_when_the_kernel_sleeps(
    addresses: tuple[xsk.ProducerRing, xsk.ConsumerRing, Shared],
) -> None:
    writer, _, shared = addresses
    assert not writer.needs_wakeup
    shared.theirs.flags.value = abi.XDP_RING_NEED_WAKEUP
    assert writer.needs_wakeup


def test_a_closed_ring_is_unmapped_and_its_views_read_zeros() -> None:
    shared = Shared(8)
    view = xsk.ProducerRing(shared.ours, ADDRESS).entries
    view[:] = 5
    assert Path("/proc/self/maps").read_text().count("memfd:ring") == 2
    shared.ours.close()
    shared.ours.close()
    assert Path("/proc/self/maps").read_text().count("memfd:ring") == 1
    assert view.tolist() == [0] * SIZE
    shared.theirs.close()


def descriptors(*rows: tuple[int, int, int]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.array(list(rows), DESCRIPTOR).view("V16")


def test_a_batch_joins_frames_that_came_in_parts() -> None:
    with xsk.Umem(xsk.UmemShape(frames=8)) as umem:
        frames = xsk.Frames(umem)
        frames.take(8)
        for at in (0, 2048, 4096, 6144):
            umem.memory[at + 256 : at + 260] = struct.pack("=I", at)
        rows = descriptors((256, 4, 0), (2304, 4, 1), (4352, 4, 1), (6400, 2, 0))
        batch = xsk.Batch(frames, rows)
        assert len(batch) == 2
        parts = [struct.pack("=I", at) for at in (0, 2048, 4096, 6144)]
        assert [bytes(frame) for frame in batch] == [parts[0], parts[1] + parts[2] + parts[3][:2]]
        assert batch.starts.tolist() == [256, 2304]
        assert batch.lengths.tolist() == [4, 4, 4, 2]
        batch.close()
        batch.close()
        assert frames.free == 4
        assert sorted(frames.take(4).tolist()) == [0, 2048, 4096, 6144]
        with pytest.raises(ValueError, match="closed or sent"):
            batch.hand_over()


def test_addresses_of_an_unaligned_umem_carry_an_offset() -> None:
    shape = xsk.UmemShape(frames=4, chunk_size=3000, unaligned=True)
    with xsk.Umem(shape) as umem:
        frames = xsk.Frames(umem)
        address = np.array([3000 | 256 << 48], ADDRESS)
        assert frames.data(address).tolist() == [3256]
        assert frames.base(address).tolist() == [3000]
        assert sorted(frames.take(4).tolist()) == [0, 3000, 6000, 9000]
        frames.give(address)
        assert frames.take(9).tolist() == [3000]


def test_chunks_are_given_out_once() -> None:
    with xsk.Umem(xsk.UmemShape(frames=4)) as umem:
        frames = xsk.Frames(umem, np.array([2048 + 256], ADDRESS))
        assert frames.take(9).tolist() == [6144, 4096, 0]
        assert frames.free == 0
        frames.give(np.array([0, 2304, 4096, 6144], ADDRESS))
        with pytest.raises(ValueError, match="more chunks"):
            frames.give(np.array([0], ADDRESS))


def test_records_at_any_byte_are_read_and_written_in_place() -> None:
    with xsk.Umem(xsk.UmemShape(frames=4)) as umem:
        ethernet = xsk.Frames(umem).at(xsk.ETHERNET)
        at = np.array([257, 2304], ADDRESS)
        umem.memory[257:271] = bytes(range(14))
        assert bytes(ethernet["src"][at][0]) == bytes(range(6, 12))
        assert ethernet["ethertype"][at].tolist() == [0x0C0D, 0]
        ethernet["dst"][at] = ethernet["src"][at]
        assert umem.memory[257:263] == bytes(range(6, 12))


def test_the_memory_cannot_be_shrunk_by_who_gets_it() -> None:
    with xsk.Umem() as umem, pytest.raises(PermissionError):
        os.ftruncate(umem.fd, 0)


def test_bytes_are_copied_between_umems_up_to_the_last_one() -> None:
    shape = xsk.UmemShape(frames=2)
    with xsk.Umem(shape) as umem, xsk.Umem(shape) as other:
        source, target = xsk.Frames(umem), xsk.Frames(other)
        umem.memory[: shape.size] = bytes(at % 251 for at in range(shape.size))
        at, lengths = np.array([7, shape.size - 9], ADDRESS), np.array([60, 9], np.uint32)
        chunks = target.copy(source, at, lengths)
        for chunk, address, length in zip(chunks, at, lengths, strict=True):
            assert other.memory[chunk : chunk + length] == umem.memory[address : address + length]
        assert target.free == 0
        with pytest.raises(ValueError, match="2049 bytes do not fit"):
            target.copy(source, at, np.array([60, 2049], np.uint32))


def test_views_outlive_a_closed_umem() -> None:
    umem = xsk.Umem(xsk.UmemShape(frames=4))
    frames = xsk.Frames(umem)
    umem.close()
    umem.close()
    frames.bytes[:] = 7
    assert int(frames.bytes.sum()) == 7 * 4 * 2048


def test_memory_that_is_too_small_is_not_adopted() -> None:
    with xsk.Umem(xsk.UmemShape(frames=4)) as umem:
        fd = os.dup(umem.fd)
        with pytest.raises(ValueError, match="8192 bytes, and the UMEM's shape needs 16384"):
            xsk.Umem.adopt(fd, xsk.UmemShape(frames=8))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"chunk_size": 1024}, "from 2048"),
        ({"chunk_size": 8192}, "to 4096 bytes"),
        ({"chunk_size": 3000}, "power of two unless unaligned"),
        ({"frames": 0}, "1 or more"),
        ({"headroom": 1792}, "no room"),
        ({"headroom": -1}, "no room"),
    ],
    ids=["small", "large", "aligned", "none", "headroom", "negative"],
)
def test_shapes_that_the_kernel_would_refuse(shape: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        xsk.UmemShape(**shape)  # type: ignore[arg-type]  # no bool is among them


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"rx": 100}, "the rx ring has 100 entries"),
        ({"rx": 0, "tx": 0}, "an RX ring or a TX ring"),
        ({"fill": 0}, "a fill and a completion ring"),
    ],
    ids=["power of two", "neither", "fill"],
)
def test_rings_that_the_kernel_would_refuse(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        xsk.RingSizes(**sizes)


def test_rings_that_are_not_chosen_hold_every_frame() -> None:
    assert xsk.RingSizes(64, 0).complete(3000) == xsk.RingSizes(64, 0, 4096, 4096)
    assert xsk.RingSizes(64, 64, 16, 32).complete(3000) == xsk.RingSizes(64, 64, 16, 32)


def test_particulars_survive_json() -> None:
    shape = xsk.UmemShape(16, 4096, 64)
    told = xsk.Particulars("eth1", 3, shape, xsk.RingSizes(64, 0).complete(16), True, False)
    assert xsk.Particulars.of(json.loads(json.dumps(told.document()))) == told


@pytest.mark.parametrize("document", [{}, {"umem": {}}, {"umem": {"frames": "many"}, "rings": {}}])
def test_other_documents_are_no_particulars(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the particulars"):
        xsk.Particulars.of(document)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, xsk.PrivilegeError),
        (errno.EBUSY, xsk.BusyError),
        (errno.EOPNOTSUPP, xsk.UnsupportedError),
        (ENOTSUPP, xsk.UnsupportedError),
        (errno.ENODEV, xsk.DeviceError),
        (errno.ENOBUFS, xsk.LimitError),
        (errno.EINVAL, xsk.XskError),
    ],
    ids=lambda value: errno.errorcode.get(value, "ENOTSUPP") if isinstance(value, int) else value.__name__,
)
def test_an_error_says_what_failed_why_and_what_helps(number: int, kind: type[xsk.XskError]) -> None:
    error = explain(number, "bind", {number: "Do this"}, "eth1", 3)
    assert type(error) is kind
    assert re.fullmatch(r"cannot bind: .+\. Do this", str(error))
    assert (error.errno, error.device, error.queue) == (number, "eth1", 3)


def test_constants_are_those_of_the_kernels_header() -> None:
    header = Path("/usr/include/linux/if_xdp.h").read_text()
    found = dict(
        re.findall(r"^#define\s+(XDP_\w+)\s+\(?(0x[0-9A-Fa-f]+|\d+(?: << \d+)?)", header, re.MULTILINE)
    )
    ours = {name: value for name, value in vars(abi).items() if name in found and isinstance(value, int)}
    assert len(ours) >= 18
    for name, value in ours.items():
        base, _, shift = found[name].partition(" << ")
        assert value == int(base, 0) << int(shift or 0), name


def test_making_sockets_takes_no_numpy_and_nothing_else_of_offload() -> None:
    code = (
        "import sys; from offload.xsk import BoundSocket, Umem, XskMap, Redirect, Particulars\n"
        "assert 'numpy' not in sys.modules, 'NumPy'\n"
        "import offload.xsk.__main__, offload.xsk.aio\n"
        "ours = [name for name in sys.modules if name.startswith('offload.')]\n"
        "print([name for name in ours if not name.startswith('offload.xsk')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_every_name_is_there() -> None:
    for name in xsk.__all__:
        assert getattr(xsk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = xsk.Nothing


def test_a_capture_is_a_pcap_with_nanoseconds() -> None:
    file = io.BytesIO()
    Writer(file).write(3_000_000_007, memoryview(b"frame"))
    assert file.getvalue() == (
        struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
        + struct.pack("=IIII", 3, 7, 5, 5)
        + b"frame"
    )


@pytest.mark.parametrize(
    "options",
    [[], ["--mode", "native", "--map", "/sys/fs/bpf/x"], ["--mode", "native", "--index", "1"]],
    ids=["neither", "both", "index alone"],
)
def test_a_tool_wants_to_be_told_where_frames_come_from(options: list[str]) -> None:
    done = CliRunner().invoke(main, ["drop", "--device", "eth1", *options])
    assert done.exit_code == 2
    assert "--map" in done.output
