"""Whose a BPF program is, as far as it can be found out: its name, and where it is pinned."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from offload.errors import KernelError, OffloadError, PrivilegeError, UnsupportedError
from offload.kernel import bpf


@dataclass(frozen=True)
class Program:
    """A loaded program. ``pins`` are the files of ``bpffs`` that hold it, or a link that runs it."""

    prog_id: int
    name: str
    pins: tuple[str, ...]


def describe(prog_id: int, bpffs: Path = Path("/sys/fs/bpf")) -> Program:
    """Return what can be known of the program with the id ``prog_id``.

    Raises PrivilegeError without CAP_SYS_ADMIN, which opening a program by its id
    takes, and KernelError when there is none of that id.
    """
    with _by_id(prog_id) as program:
        name = program.info().name
    files = (path for path in sorted(bpffs.rglob("*")) if path.is_file())
    return Program(prog_id, name, tuple(str(path) for path in files if _pinned_program(path) == prog_id))


def _by_id(prog_id: int) -> bpf.Program:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise UnsupportedError(f"{error}: install the distribution's libbpf1") from error
    descriptor = library.bpf_prog_get_fd_by_id(ctypes.c_uint32(prog_id))
    if descriptor >= 0:
        return bpf.Program(descriptor)
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PrivilegeError(f"BPF program {prog_id}: opening it by its id needs CAP_SYS_ADMIN")
    raise KernelError(f"BPF program {prog_id}: {os.strerror(code)}")


def _pinned_program(path: Path) -> int | None:
    """Return the id of the program that a pin holds, itself or by a link; None for other files."""
    try:
        # What is pinned may be a map or a link too: nothing but its descriptor is used.
        with bpf.Program.pinned(path) as pinned:
            described = Path(f"/proc/self/fdinfo/{pinned.fd}").read_text()
    except (FileNotFoundError, OffloadError):
        return None  # pins of other people come and go, and the kernel's own *.debug are no pins
    found = re.search(r"^prog_id:\s*(\d+)$", described, re.MULTILINE)
    return int(found[1]) if found else None
