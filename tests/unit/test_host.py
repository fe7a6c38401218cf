"""Probes of the host that need no privilege."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from offload.kernel import host


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0\n", (0,)), ("0-3\n", (0, 1, 2, 3)), ("0-1,4,6-7\n", (0, 1, 4, 6, 7))],
)
def test_cpu_list(text: str, cpus: tuple[int, ...]) -> None:
    assert host.parse_cpu_list(text) == cpus


def test_online_cpus_are_those_that_the_c_library_counts() -> None:
    assert len(host.online_cpus()) == os.sysconf("SC_NPROCESSORS_ONLN")


def test_a_directory_elsewhere_is_not_on_a_bpf_file_system(tmp_path: Path) -> None:
    answer = host.bpffs(tmp_path / "not" / "there")
    assert answer.state == "no"
    assert str(tmp_path) in answer.why
    assert f"mount -t bpf bpf {tmp_path}/not/there" in answer.remedy


def test_another_package_named_bcc_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    answer = host.bcc()
    assert answer.state == "no"
    assert "another package named bcc" in answer.why
    assert "python3-bpfcc" in answer.remedy


def test_no_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    answer = host.bcc()
    assert answer.state == "no"
    assert "no module bcc" in answer.why


def test_bcc_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc").mkdir()
    for name in ("__init__.py", "libbcc.py"):
        (tmp_path / "bcc" / name).write_text("raise AssertionError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(host, "BCC_LIBRARY", "libbcc-that-is-not-there.so.0")
    answer = host.bcc()
    assert answer.state == "no"
    assert "libbcc-that-is-not-there.so.0: cannot open" in answer.why
    assert answer.remedy == "apt install libbpfcc"
