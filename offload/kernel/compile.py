"""Compile BPF C with bcc into an artifact that loads without a compiler.

bcc brings LLVM into the process, some 125 MB of it, so the work is done by
``python -m offload.kernel.compile`` in a process that ends with it. What comes back is
plain data (an ``Artifact``): the instructions with the maps' *names* in place of
file descriptors, the maps' types and sizes, the C structs of their keys and
values, and which source line each instruction came from. It depends on the
sources and the flags alone, so it is cached under their digest and may be carried
to hosts that have no compiler.

bcc insists on a kernel source tree for a handful of headers. XDP and tc programs
use nothing but stable UAPI, which the C library's headers have, so a directory of
stand-ins is all that it gets (``_kernel_tree``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KernelError, UnsupportedError

FORMAT = 2
INSN_BYTES = 8
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1
_DEBUG_SOURCE = 0x8  # bcc: print the instructions under their source lines
_BCC_FILE = "/virtual/main.c"  # bcc's name for any source
_TRACEBACK = "Traceback (most recent call last)"  # Python's, after the C compiler has said what is wrong

_XDP, _SCHED_CLS = 6, 3  # enum bpf_prog_type
_TC_PROGRAMS = ("sent", "wire", "guard", "strayed", "unwrap", "silence")
"""Of switch.c; everything else is XDP."""


@dataclass(frozen=True)
class MapSpec:
    """A map as the C source declares it. ``key`` and ``value`` are bcc's struct descriptions."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key: Any
    value: Any


@dataclass(frozen=True)
class ProgramSpec:
    """Instructions (8 bytes each), and for some of them the map or the source line that they name."""

    type: int
    instructions: bytes
    maps: Mapping[int, str]
    lines: Mapping[int, str]


@dataclass(frozen=True)
class Artifact:
    """Everything that one C file compiled to. ``digest`` names sources and flags."""

    digest: str
    programs: Mapping[str, ProgramSpec]
    maps: Mapping[str, MapSpec]


def sources() -> Path:
    """The directory of the BPF sources: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for place in (package.parent / "bpf", package / "bpf"):
        if (place / "vmq.c").is_file():
            return place
    raise KernelError(f"the BPF sources are missing beside {package}: install offload again")


def digest_of(source: Path, defines: Mapping[str, int]) -> str:
    """SHA-256 over everything that the result depends on, as 64 hex digits."""
    summary = hashlib.sha256(f"{FORMAT} {os.uname().machine} {source.name}".encode())
    for directory in (source.parent, sources()):
        for header in sorted(directory.glob("*.h")):
            summary.update(header.read_bytes())
    summary.update(source.read_bytes())
    summary.update(json.dumps(sorted(defines.items())).encode())
    return summary.hexdigest()


def compiled(name: str, defines: Mapping[str, int], cache: Path) -> Artifact:
    """The artifact of ``bpf/NAME``, from the cache where it is there already.

    Raises ``KernelError`` with the compiler's words when the source does not
    compile, ``UnsupportedError`` when the compiler itself is not there.
    """
    return compiled_file(sources() / name, defines, cache)


def compiled_file(source: Path, defines: Mapping[str, int], cache: Path) -> Artifact:
    """``compiled`` for a C file that stands anywhere; headers are those beside it and ours."""
    digest = digest_of(source, defines)
    kept = cache / f"{source.stem}-{digest[:16]}.json"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile_in_child(source, defines, kept)
    return _from_json(json.loads(kept.read_text()), digest)


def _compile_in_child(source: Path, defines: Mapping[str, int], result: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=result.parent, prefix=".compiling-", delete=False) as unfinished:
        flags = [f"{key}={value}" for key, value in sorted(defines.items())]
        command = [sys.executable, "-m", __name__, str(source), unfinished.name, *flags]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        os.unlink(unfinished.name)
        if child.returncode == UnsupportedError.exit_code:
            raise UnsupportedError(child.stderr.strip())
        said, trace, raised = child.stderr.replace(_BCC_FILE, source.name).partition(_TRACEBACK)
        raise KernelError(f"{source.name} does not compile:\n{said.strip() or trace + raised}")
    os.rename(unfinished.name, result)


def _from_json(data: Any, digest: str) -> Artifact:
    programs = {
        name: ProgramSpec(
            type=program["type"],
            instructions=base64.b64decode(program["instructions"]),
            maps={int(index): map_name for index, map_name in program["maps"].items()},
            lines={int(index): line for index, line in program["lines"].items()},
        )
        for name, program in data["programs"].items()
    }
    return Artifact(digest, programs, {name: MapSpec(**spec) for name, spec in data["maps"].items()})


# What follows runs in the child.

_STAND_INS = {
    "include/linux/kconfig.h": (
        "#define CONFIG_BPF_SYSCALL 1\n"
        "#include <linux/types.h>\n"
        "typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;\n"
        "typedef __s8 s8; typedef __s16 s16; typedef __s32 s32; typedef __s64 s64;\n"
        "typedef _Bool bool; typedef __SIZE_TYPE__ size_t; typedef __UINTPTR_TYPE__ uintptr_t;\n"
    ),
    "include/linux/log2.h": "",
    "include/asm/page.h": "",
    "include/generated/uapi/linux/version.h": "#define LINUX_VERSION_CODE 0\n",
    "include/uapi/linux/bpf.h": "",  # bcc brings its own
}


def _kernel_tree(root: Path) -> None:
    """What bcc wants to see of a kernel source tree, made of the C library's UAPI headers."""
    system = Path("/usr/include")
    machine = next(system.glob("*-linux-gnu*/asm")).parent
    for path, text in _STAND_INS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for header in (system / "linux").iterdir():
        target = root / "include/uapi/linux" / header.name
        if not target.exists():
            target.symlink_to(header)
    (root / "include/uapi/asm").symlink_to(machine / "asm")
    (root / "include/asm-generic").symlink_to(system / "asm-generic")
    for header in (machine / "asm").iterdir():
        (root / "include/asm" / header.name).symlink_to(header)


def _lines_of(listing: str, source: str) -> dict[str, dict[int, str]]:
    """Per program, the source line at which an instruction's line begins, from bcc's listing."""
    lines: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    pending = 0
    own = _own_lines(listing, source)
    for row in listing.splitlines():
        if section := re.match(r"Disassembly of function (\w+)", row):
            current = lines.setdefault(section[1], {})
        elif listed := re.search(_LISTED, row):
            pending = int(listed[2])
        elif (instruction := re.match(r"\s*(\d+):\t", row)) and pending:
            current[int(instruction[1])] = own[pending]
            pending = 0
    return lines


_LISTED = re.compile(r"^; *(.*?)\s+// Line\s+(\d+)$", re.MULTILINE)


def _own_lines(listing: str, source: str) -> dict[int, str]:
    """What the source has for a line number of the listing; bcc inserts lines and rewrites map operations.

    Lines that are listed as they were written tell by how much the numbers are off around them.
    """
    own = [" ".join(line.split()) for line in source.splitlines()]
    listed = {int(number): " ".join(text.split()) for text, number in re.findall(_LISTED, listing)}
    shift = {number: number - own.index(text) for number, text in listed.items() if own.count(text) == 1}
    lines = {}
    for number, text in listed.items():
        nearest = min(shift, default=0, key=lambda known: (known > number, abs(known - number)))
        index = number - shift.get(nearest, 0)
        lines[number] = f"line {index + 1}: {own[index]}" if 0 <= index < len(own) else text
    return lines


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Collect what the C library's stderr gets, for bcc prints its listing there; give it out on failure."""
    with tempfile.TemporaryFile() as collected:
        terminal = os.dup(2)
        os.dup2(collected.fileno(), 2)

        def said() -> str:
            collected.seek(0)
            return collected.read().decode(errors="replace")

        try:
            yield said
        except BaseException:
            os.write(terminal, said().encode())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _compile(source: Path, defines: Mapping[str, int]) -> dict[str, Any]:
    import ctypes

    try:
        from bcc import BPF
        from bcc.libbcc import lib
    except ImportError as error:
        raise UnsupportedError(
            "the BPF compiler is missing: install the distribution's python3-bpfcc "
            "(PyPI's bcc is another package)"
        ) from error

    with tempfile.TemporaryDirectory() as tree:
        _kernel_tree(Path(tree))
        os.environ["BCC_KERNEL_SOURCE"] = tree
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        flags += [f"-I{source.parent.resolve()}", f"-I{sources()}"]
        with _captured_stderr() as said:
            module = BPF(src_file=str(source), cflags=flags, debug=_DEBUG_SOURCE)
            lines = _lines_of(said(), source.read_text())

    lib.bpf_table_name.restype = ctypes.c_char_p
    by_fd, maps = {}, {}
    for index in range(lib.bpf_num_tables(module.module)):
        name = lib.bpf_table_name(module.module, index)
        by_fd[lib.bpf_table_fd(module.module, name)] = name.decode()
        maps[name.decode()] = {
            "type": lib.bpf_table_type_id(module.module, index),
            "key_size": lib.bpf_table_key_size(module.module, name),
            "value_size": lib.bpf_table_leaf_size(module.module, name),
            "max_entries": lib.bpf_table_max_entries_id(module.module, index),
            "flags": lib.bpf_table_flags_id(module.module, index),
            "key": json.loads(lib.bpf_table_key_desc(module.module, name)),
            "value": json.loads(lib.bpf_table_leaf_desc(module.module, name)),
        }
    programs = {}
    for index in range(lib.bpf_num_functions(module.module)):
        name = lib.bpf_function_name(module.module, index).decode()
        code = bytearray(module.dump_func(name.encode()))
        programs[name] = {
            "type": _SCHED_CLS if name in _TC_PROGRAMS else _XDP,
            "maps": _name_maps(code, by_fd),
            "instructions": base64.b64encode(bytes(code)).decode(),
            "lines": lines.get(name, {}),
        }
    return {"programs": programs, "maps": maps}


def _name_maps(code: bytearray, by_fd: Mapping[int, str]) -> dict[int, str]:
    """Take the file descriptors out of the instructions; say which map each of them was."""
    named = {}
    for index in range(len(code) // INSN_BYTES):
        at = index * INSN_BYTES
        if code[at] == _LD_IMM64 and code[at + 1] >> 4 == _PSEUDO_MAP_FD:
            named[index] = by_fd[int.from_bytes(code[at + 4 : at + 8], "little")]
            code[at + 4 : at + 8] = bytes(4)
    return named


def main(arguments: list[str]) -> int:
    source, result, *flags = arguments
    defines = {key: int(value) for key, value in (flag.split("=") for flag in flags)}
    try:
        data = _compile(Path(source), defines)
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    Path(result).write_text(json.dumps(data))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
