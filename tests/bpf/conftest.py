"""Fixtures of the BPF tier. Compiled programs are kept for the whole test run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bpf.loaded import Vmq
from tests.instance import shared_cache
from tests.lab import Lab


@pytest.fixture(scope="session")
def cache(privilege: None) -> Path:
    """Where compiled programs are kept. Scope: the test run."""
    return shared_cache()


@pytest.fixture(scope="module")
def one_lab(privilege: None) -> Iterator[Lab]:
    """A laboratory for tests that leave it as it was. Scope: one module."""
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def cpus() -> tuple[int, int]:
    """The CPU that plays the NIC's, and another one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip(f"a queue's CPU must not be the NIC's, and there is only CPU {allowed[0]}")
    return allowed[0], allowed[1]


@pytest.fixture
def vmq(one_lab: Lab, cache: Path, cpus: tuple[int, int]) -> Iterator[Vmq]:
    """The uplink's programs with empty tables. Scope: one test."""
    with Vmq(one_lab.host, cache, cpus[0]) as loaded:
        yield loaded


@pytest.fixture
def bpffs(privilege: None, tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of the test's own. Whatever is pinned there goes with it. Scope: one test."""
    where = tmp_path / "bpf"
    where.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)
