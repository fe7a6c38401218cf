"""From C to loaded programs: the cache, the compiler's own process, and what is said of mistakes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from offload.errors import KernelError, UnsupportedError
from offload.kernel import compile as compiler
from offload.kernel.bpf import AttachType, Map, Program
from offload.kernel.compile import Artifact, compiled, compiled_file, digest_of, sources

BROKEN = Path(__file__).with_name("broken.c")
DEFINES = {"MAX_PORTS": 16, "MAX_CPUS": 1, "MAX_NIC_QUEUES": 4}


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The command lines of the processes that are started from now on. Scope: one test."""
    started: list[Any] = []
    run = subprocess.run

    def spy(command: Any, **options: Any) -> Any:
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    return started


def test_the_cache_spares_the_compiler(privilege: None, tmp_path: Path, children: list[Any]) -> None:
    first = compiled("vmq.c", DEFINES, tmp_path)
    assert len(children) == 1
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    assert compiled("vmq.c", DEFINES, tmp_path) == first
    assert len(children) == 1
    assert kept.stat().st_mtime_ns == written


def test_another_flag_is_another_artifact(privilege: None, tmp_path: Path, children: list[Any]) -> None:
    few, many = (compiled("vmq.c", {**DEFINES, "MAX_PORTS": number}, tmp_path) for number in (16, 32))
    assert len(children) == len(list(tmp_path.iterdir())) == 2
    assert few.digest != many.digest
    assert (few.maps["ports"].max_entries, many.maps["ports"].max_entries) == (16, 32)


@pytest.mark.parametrize("changed", ["vmq.c", "abi.h"])
def test_a_changed_source_is_another_artifact(tmp_path: Path, changed: str) -> None:
    for name in ("vmq.c", "abi.h", "classifier.h", "parse.h"):
        (tmp_path / name).write_bytes((sources() / name).read_bytes())
    before = digest_of(tmp_path / "vmq.c", DEFINES)
    assert digest_of(tmp_path / "vmq.c", DEFINES) == before
    (tmp_path / changed).write_text((tmp_path / changed).read_text() + "/* changed */\n")
    assert digest_of(tmp_path / "vmq.c", DEFINES) != before


def test_a_file_elsewhere_depends_on_our_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "alone" / "program.c"
    source.parent.mkdir()
    source.write_text('#include "abi.h"\n')
    monkeypatch.setattr(compiler, "sources", lambda: tmp_path)
    (tmp_path / "abi.h").write_text("#define A 1\n")
    before = digest_of(source, {})
    (tmp_path / "abi.h").write_text("#define A 2\n")
    assert digest_of(source, {}) != before


def test_a_c_error_names_file_and_line(privilege: None, tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("#include <linux/bpf.h>\n\nint wrong(struct xdp_md *ctx)\n{\n\treturn nonsense;\n}\n")
    cache = tmp_path / "cache"
    with pytest.raises(KernelError) as raised:
        compiled_file(source, {}, cache)
    said = str(raised.value)
    assert said.startswith("wrong.c does not compile:")
    assert "wrong.c:5:9: error: use of undeclared identifier 'nonsense'" in said
    assert "Traceback" not in said
    assert list(cache.iterdir()) == [], "something half done was left in the cache"


def test_a_missing_compiler_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="install the distribution's python3-bpfcc"):
        compiled("vmq.c", DEFINES, tmp_path / "cache")


def test_the_compiler_never_enters_this_process(privilege: None, tmp_path: Path) -> None:
    """In a process of its own, so that nothing else that a test run loads is in the way."""
    program = (
        "from pathlib import Path\n"
        "from offload.kernel.compile import compiled\n"
        f"compiled('vmq.c', {DEFINES}, Path({str(tmp_path)!r}))\n"
        "print(Path('/proc/self/maps').read_text())\n"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in shown
    assert "LLVM" not in shown
    assert "libbcc" not in shown


def load(artifact: Artifact, name: str) -> None:
    maps: Mapping[str, Map] = {key: Map.create(key, spec) for key, spec in artifact.maps.items()}
    try:
        Program.load(name, artifact.programs[name], maps, AttachType.XDP, frags=True).close()
    finally:
        for opened in maps.values():
            opened.close()


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("unbounded", "return data[100] ? XDP_DROP : XDP_PASS;", "invalid access to packet"),
        (
            "unchecked",
            "return port->flags & PORT_RUNNING ? XDP_DROP : XDP_PASS;",
            "invalid mem access 'map_value_or_null'",
        ),
    ],
)
def test_the_verifier_s_refusal_shows_our_lines(cache: Path, name: str, line: str, reason: str) -> None:
    artifact = compiled_file(BROKEN, {}, cache)
    with pytest.raises(KernelError) as raised:
        load(artifact, name)
    said = str(raised.value)
    number = BROKEN.read_text().splitlines().index("\t" + line) + 1
    assert said.startswith(f"the kernel's verifier refuses program {name}:\n")
    assert f"; line {number}: {line}" in said
    assert said.index(f"; line {number}: {line}") < said.index(reason)


def test_every_line_that_is_told_is_a_line_of_the_source(cache: Path) -> None:
    source = (sources() / "vmq.c").read_text().splitlines()
    lines = (
        compiled("vmq.c", {"MAX_PORTS": 64, "MAX_CPUS": 1, "MAX_NIC_QUEUES": 4, "QUEUE_CPUS": 1}, cache)
        .programs["uplink"]
        .lines
    )
    assert len(lines) > 30
    for told in lines.values():
        number, _, text = told.removeprefix("line ").partition(": ")
        assert " ".join(source[int(number) - 1].split()) == text
