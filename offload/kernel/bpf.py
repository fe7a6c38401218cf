"""BPF maps, programs and links through libbpf, without a compiler.

Every object here is a handle on something in the kernel, held by a file
descriptor. ``close()`` lets go of the handle and nothing else: a map lives on while a program
or a pin holds it, a program while a link or a map holds it, a link while its pin
does. ``pin()`` makes an object outlive the process; removing the pin's file undoes that.

Constants and structs are those of ``include/uapi/linux/bpf.h`` and of libbpf 1.1's
``bpf.h``; libbpf extends the option structs at their end only and is told our sizes.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Self

from ..closing import Closing
from ..errors import ForeignError, KernelError, OffloadError, PrivilegeError, UnsupportedError
from .compile import INSN_BYTES, MapSpec, ProgramSpec

F_XDP_HAS_FRAGS = 1 << 5
F_TEST_XDP_LIVE_FRAMES = 1 << 1
F_MMAPABLE = 1 << 10
XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2
_OBJECT_NAME = 15  # BPF_OBJ_NAME_LEN without the terminator
_LOG_BYTES = 1 << 24
_BATCH = 256  # entries; a bucket of the kernel's hash maps holds a few
_POSITION = 16  # bytes that are enough to say where a batch ended


class AttachType(IntEnum):
    """``enum bpf_attach_type``, as far as it is used here."""

    NONE = 0
    XDP_DEVMAP = 33
    XDP_CPUMAP = 35
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class MapType(IntEnum):
    """``enum bpf_map_type``, as far as it is used here."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    ARRAY_OF_MAPS = 12
    DEVMAP = 14
    CPUMAP = 16
    XSKMAP = 17
    RINGBUF = 27


class _MapOptions(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("btf_fd", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("map_extra", ct.c_uint64),
        ("numa_node", ct.c_uint32),
        ("map_ifindex", ct.c_uint32),
    ]


class _LoadOptions(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
        ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p),
        ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_char_p),
    ]


class _LinkOptions(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("flags", ct.c_uint32),
        ("iter_info", ct.c_void_p),
        ("iter_info_len", ct.c_uint32),
        ("target_btf_id", ct.c_uint32),
        ("attach", ct.c_uint64 * 4),
    ]


class _BatchOptions(ct.Structure):
    _fields_ = [("sz", ct.c_size_t), ("elem_flags", ct.c_uint64), ("flags", ct.c_uint64)]


class _RunOptions(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("data_in", ct.c_char_p),
        ("data_out", ct.c_char_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    ]


class _MapInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    ]


class _ProgramInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
        ("ifindex", ct.c_uint32),
        ("gpl_compatible", ct.c_uint32),
        ("netns_dev", ct.c_uint64),
        ("netns_ino", ct.c_uint64),
        ("nr_jited_ksyms", ct.c_uint32),
        ("nr_jited_func_lens", ct.c_uint32),
        ("jited_ksyms", ct.c_uint64),
        ("jited_func_lens", ct.c_uint64),
        ("btf_id", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("func_info", ct.c_uint64),
        ("nr_func_info", ct.c_uint32),
        ("nr_line_info", ct.c_uint32),
        ("line_info", ct.c_uint64),
        ("jited_line_info", ct.c_uint64),
        ("nr_jited_line_info", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("jited_line_info_rec_size", ct.c_uint32),
        ("nr_prog_tags", ct.c_uint32),
        ("prog_tags", ct.c_uint64),
        ("run_time_ns", ct.c_uint64),
    ]


class _LinkInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("padding", ct.c_uint32),  # the union behind it begins at a multiple of 8
        ("ifindex", ct.c_uint32),  # the union's members for XDP and for tcx begin alike
        ("attach_type", ct.c_uint32),
    ]


@cache
def _libbpf() -> ct.CDLL:
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise UnsupportedError("libbpf.so.1 is missing: install the distribution's libbpf1") from error
    lib.libbpf_set_print.restype = ct.c_void_p
    lib.libbpf_set_print(None)  # its warnings repeat what our errors say
    return lib


def _call(function: str, *arguments: object, doing: str) -> int:
    """Call libbpf; the result is 0 or a file descriptor. ``doing`` completes "could not …" in the error."""
    result: int = getattr(_libbpf(), function)(*arguments)
    if result < 0:
        raise _error(-result, doing)
    return result


def _error(number: int, doing: str) -> OffloadError:
    """The one place where a bpf errno becomes one of our errors."""
    text = f"could not {doing}: {os.strerror(number)}"
    match number:
        case errno.EPERM | errno.EACCES:
            error: OffloadError = PrivilegeError(f"{text} (CAP_BPF and CAP_NET_ADMIN are needed)")
        case errno.EOPNOTSUPP:
            error = UnsupportedError(text)
        case errno.EBUSY | errno.EEXIST:
            error = ForeignError(text)
        case _:
            error = KernelError(text)
    error.__cause__ = OSError(number, os.strerror(number))
    return error


class _Handle(Closing):
    """A file descriptor of a BPF object, closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pin(self, path: Path) -> None:
        """Keep the object alive, under this name, until the file is removed."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _call("bpf_obj_pin", self.fd, os.fsencode(path), doing=f"pin {path}")

    def pin_anew(self, path: Path) -> None:
        """As ``pin``, in place of what is pinned there."""
        path.unlink(missing_ok=True)
        self.pin(path)

    @classmethod
    def pinned(cls, path: Path) -> Self:
        """The object pinned at ``path``; ``FileNotFoundError`` when there is none."""
        if not path.exists():
            raise FileNotFoundError(path)
        return cls(_call("bpf_obj_get", os.fsencode(path), doing=f"open the pinned object {path}"))

    def _fill(self, info: ct.Structure) -> None:
        length = ct.c_uint32(ct.sizeof(info))
        _call(
            "bpf_obj_get_info_by_fd",
            self.fd,
            ct.byref(info),
            ct.byref(length),
            doing="read a BPF object's info",
        )


@dataclass(frozen=True)
class MapShape:
    """Type, sizes in bytes, number of entries and flags of a map."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Map(_Handle):
    """A BPF map. Keys and values are bytes in the host's byte order, as the C structs have them."""

    @classmethod
    def create(
        cls, name: str, spec: MapSpec, max_entries: int | None = None, inner: Map | None = None
    ) -> Self:
        """A new map as the C source declares it, with other ``max_entries`` where given.

        ``inner`` is one like those that a map of maps is to hold.
        """
        options = _MapOptions(sz=ct.sizeof(_MapOptions), map_flags=spec.flags)
        if inner:
            options.inner_map_fd = inner.fd
        entries = max_entries or spec.max_entries
        label = name[:_OBJECT_NAME].encode()
        sizes = (spec.key_size, spec.value_size, entries)
        return cls(
            _call("bpf_map_create", spec.type, label, *sizes, ct.byref(options), doing=f"create map {name}")
        )

    def shape(self) -> MapShape:
        info = _MapInfo()
        self._fill(info)
        return MapShape(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)

    def id(self) -> int:
        info = _MapInfo()
        self._fill(info)
        return int(info.id)

    def lookup(self, key: bytes, value_size: int) -> bytes | None:
        """The value under ``key``, of all possible CPUs for per-CPU maps; ``None`` without one."""
        value = ct.create_string_buffer(value_size)
        result = _libbpf().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        if result < 0:
            raise _error(-result, "read a map")
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        _call("bpf_map_update_elem", self.fd, key, value, ct.c_uint64(0), doing="write to a map")

    def delete(self, key: bytes) -> None:
        """Remove ``key``; nothing happens when it is not there."""
        result = _libbpf().bpf_map_delete_elem(self.fd, key)
        if result < 0 and result != -errno.ENOENT:
            raise _error(-result, "delete from a map")

    def items(self) -> list[tuple[bytes, bytes]]:
        """Every key of a hash map with its value, in a few system calls. Not for per-CPU maps.

        What is added or removed meanwhile may be in it or not.
        """
        shape = self.shape()
        count = _BATCH
        found: list[tuple[bytes, bytes]] = []
        position, last = ct.create_string_buffer(_POSITION), True
        options = _BatchOptions(sz=ct.sizeof(_BatchOptions))
        while True:
            keys = ct.create_string_buffer(count * shape.key_size)
            values = ct.create_string_buffer(count * shape.value_size)
            number = ct.c_uint32(count)
            before = None if last else position
            result = _libbpf().bpf_map_lookup_batch(
                self.fd, before, position, keys, values, ct.byref(number), ct.byref(options)
            )
            if result == -errno.ENOSPC:  # more in one bucket than would fit
                count *= 2
                continue
            if result < 0 and result != -errno.ENOENT:
                raise _error(-result, "read a map in a batch")
            last = False
            found += [
                (
                    keys.raw[at * shape.key_size : (at + 1) * shape.key_size],
                    values.raw[at * shape.value_size : (at + 1) * shape.value_size],
                )
                for at in range(number.value)
            ]
            if result == -errno.ENOENT:
                return found

    def read_first(self, count: int, value_size: int) -> bytes:
        """The values of an array's first ``count`` entries, one after the other, in one system call.

        For per-CPU arrays each entry is the values of all possible CPUs, in CPU order.
        """
        values = ct.create_string_buffer(count * value_size)
        keys = (ct.c_uint32 * count)()
        position, number = ct.c_uint32(), ct.c_uint32(count)
        options = _BatchOptions(sz=ct.sizeof(_BatchOptions))
        result = _libbpf().bpf_map_lookup_batch(
            self.fd, None, ct.byref(position), keys, values, ct.byref(number), ct.byref(options)
        )
        if result < 0 and result != -errno.ENOENT:  # ENOENT: that was the whole map
            raise _error(-result, "read a map in a batch")
        if number.value != count:
            raise KernelError(f"a map gave {number.value} of {count} entries")
        return values.raw

    def mapped(self) -> mmap.mmap:
        """The whole array in memory: a store there is seen by programs at once. Needs ``F_MMAPABLE``."""
        shape = self.shape()
        length = shape.max_entries * shape.value_size
        pages = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(self.fd, pages)


_SAMPLE = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)  # libbpf's ring_buffer_sample_fn


class RingBuffer:
    """Reads what programs wrote to a ring buffer map. One reader at a time: reading takes out.

    ``fd`` is readable while there is something. ``close`` leaves the map, and what is in it.
    """

    def __init__(self, ring: Map) -> None:
        self._taken: list[bytes] = []
        self._callback = _SAMPLE(self._take)
        lib = _libbpf()
        lib.ring_buffer__new.restype = ct.c_void_p
        self._ring: int | None = lib.ring_buffer__new(ring.fd, self._callback, None, None)
        if self._ring is None:
            raise _error(ct.get_errno(), "open a ring buffer")
        self.fd = _call("ring_buffer__epoll_fd", ct.c_void_p(self._ring), doing="wait on a ring buffer")

    def _take(self, _context: object, data: int, size: int) -> int:
        self._taken.append(ct.string_at(data, size))
        return 0

    def drain(self) -> list[bytes]:
        """Everything that was written and not taken yet, oldest first."""
        _call("ring_buffer__consume", ct.c_void_p(self._ring), doing="read a ring buffer")
        taken, self._taken = self._taken, []
        return taken

    def close(self) -> None:
        if self._ring is not None:
            _libbpf().ring_buffer__free(ct.c_void_p(self._ring))
            self._ring = None


@dataclass(frozen=True)
class ProgramInfo:
    """A loaded program: kernel id, name, tag as bpftool shows it, time spent in it where that is counted."""

    id: int
    name: str
    tag: str
    run_seconds: float | None


@dataclass(frozen=True)
class RunResult:
    """What BPF_PROG_TEST_RUN gave: verdict, the frame afterwards, mean time in ns per run."""

    verdict: int
    frame: bytes
    nanoseconds: int


class Program(_Handle):
    """A loaded BPF program."""

    @classmethod
    def load(
        cls,
        name: str,
        spec: ProgramSpec,
        maps: Mapping[str, Map],
        attach: AttachType,
        *,
        frags: bool,
        types: tuple[bytes, bytes] | None = None,
    ) -> Self:
        """Load into the kernel. A refusal by the verifier shows its log beside our source lines.

        ``types``: BTF, and one ``struct bpf_func_info``, for a program of one function.
        """
        code = bytearray(spec.instructions)
        for index, map_name in spec.maps.items():
            at = index * INSN_BYTES + 4
            code[at : at + 4] = maps[map_name].fd.to_bytes(4, "little")
        options = _LoadOptions(
            sz=ct.sizeof(_LoadOptions),
            expected_attach_type=attach,
            prog_flags=F_XDP_HAS_FRAGS if frags else 0,
        )
        if types:
            btf, function = types
            options.prog_btf_fd = _call("bpf_btf_load", btf, ct.c_size_t(len(btf)), None, doing="load BTF")
            held = ct.create_string_buffer(function, len(function))
            options.func_info, options.func_info_cnt = ct.addressof(held), 1
            options.func_info_rec_size = len(function)
        label = name[:_OBJECT_NAME].encode()
        instructions = (ct.c_char * len(code)).from_buffer(code)
        arguments = (spec.type, label, b"GPL", instructions, ct.c_size_t(len(code) // INSN_BYTES))
        result = _libbpf().bpf_prog_load(*arguments, ct.byref(options))
        if result < 0:
            log = ct.create_string_buffer(_LOG_BYTES)
            options.log_level, options.log_size = 1, _LOG_BYTES
            options.log_buf = ct.cast(log, ct.c_char_p)
            result = _libbpf().bpf_prog_load(*arguments, ct.byref(options))
        if types:
            os.close(options.prog_btf_fd)
        if result < 0:
            told = _with_source(log.value.decode(errors="replace"), spec.lines)
            if not told or result == -errno.EPERM:
                refusal = _error(-result, f"load program {name}")
                raise refusal from refusal.__cause__
            cause = OSError(-result, os.strerror(-result))  # EACCES too: a program's fault, not a privilege's
            raise KernelError(f"the kernel's verifier refuses program {name}:\n{told}") from cause
        return cls(result)

    def info(self) -> ProgramInfo:
        info = _ProgramInfo()
        self._fill(info)
        return ProgramInfo(
            id=info.id,
            name=bytes(info.name).decode(),
            tag=bytes(info.tag).hex(),
            # Nothing is counted unless kernel.bpf_stats_enabled is set.
            run_seconds=info.run_time_ns / 1e9 if info.run_time_ns else None,
        )

    def test_run(
        self, frame: bytes, *, repeat: int = 1, ctx: bytes | None = None, live: bool = False
    ) -> RunResult:
        """Run on ``frame`` without sending it anywhere. Counters and maps change as in real traffic.

        With ``live``, what the program redirects, sends back or passes is real traffic: ``repeat``
        frames, whose memory is used again as the program left it.
        """
        out = ct.create_string_buffer(max(len(frame) + 256, 4096))
        options = _RunOptions(
            sz=ct.sizeof(_RunOptions),
            data_in=frame,
            data_size_in=len(frame),
            data_out=ct.cast(out, ct.c_char_p),
            data_size_out=len(out),
            repeat=repeat,
            flags=F_TEST_XDP_LIVE_FRAMES if live else 0,
        )
        if ctx is not None:
            held = ct.create_string_buffer(ctx, len(ctx))
            options.ctx_in, options.ctx_size_in = ct.addressof(held), len(ctx)
        _call("bpf_prog_test_run_opts", self.fd, ct.byref(options), doing="run a program on a test frame")
        return RunResult(options.retval, out.raw[: options.data_size_out], options.duration)


def _with_source(log: str, lines: Mapping[int, str]) -> str:
    """The verifier's log, each instruction that begins a source line preceded by that line."""
    told = []
    for row in log.splitlines():
        index = row.split(":", 1)[0]
        if index.isdigit() and int(index) in lines:
            told.append(f"; {lines[int(index)]}")
        told.append(row)
    return "\n".join(told)


@dataclass(frozen=True)
class LinkInfo:
    """Which program is attached where. ``ifindex`` is 0 when the device has gone."""

    id: int
    prog_id: int
    ifindex: int


class Link(_Handle):
    """A program's attachment. It ends with the last handle or pin, or with the device."""

    @classmethod
    def create(
        cls, program: Program, ifindex: int, attach: AttachType, *, flags: int = 0, doing: str
    ) -> Self:
        options = _LinkOptions(sz=ct.sizeof(_LinkOptions), flags=flags)
        return cls(
            _call("bpf_link_create", program.fd, ifindex, ct.c_int(attach), ct.byref(options), doing=doing)
        )

    def info(self) -> LinkInfo:
        info = _LinkInfo()
        self._fill(info)
        return LinkInfo(info.id, info.prog_id, info.ifindex)

    def detach(self) -> None:
        """Take the program off now. (Removing the last pin does so as well, but a moment later.)"""
        _call("bpf_link_detach", self.fd, doing="detach a program")

    def replace(self, program: Program) -> None:
        """Put another program in place, between two frames: none is lost and none sees neither."""
        _call("bpf_link_update", self.fd, program.fd, None, doing="replace a program under its link")


def possible_cpus() -> int:
    """How many CPUs per-CPU maps have values for, whether or not they are online."""
    return _call("libbpf_num_possible_cpus", doing="count the possible CPUs")
