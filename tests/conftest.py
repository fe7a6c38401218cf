"""Fixtures that every test tier may use.

Tests in ``tests/unit`` need no privilege. Tests that ask for ``lab`` or ``make_lab`` need root;
without it they are skipped with the reason that the kernel gave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lab import Lab, missing_privilege


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="try every combination where a choice would do, and watch a minute where seconds would do",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "privilege" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def privilege() -> None:
    """Skip unless namespaces can be made. Root that cannot make them is a failure, not a skip."""
    reason = missing_privilege()
    if reason is not None and os.geteuid() == 0:
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether ``--long`` was asked for."""
    return bool(request.config.getoption("long"))


@pytest.fixture(scope="session")
def bridge_filters_vlans(privilege: None) -> bool:
    """Whether this kernel has CONFIG_BRIDGE_VLAN_FILTERING; else it answers EOPNOTSUPP."""
    with Lab(queues=1) as lab:
        made = lab.host.run(
            "ip", "link", "add", "probe", "type", "bridge", "vlan_filtering", "1", check=False
        )
    assert made.returncode == 0 or "not supported" in made.stderr, made.stderr
    return made.returncode == 0


@pytest.fixture
def make_lab(privilege: None) -> Iterator[Callable[..., Lab]]:
    """Build laboratories with options: ``lab = make_lab(queues=2, ipv6=True)``. Scope: one test."""
    with ExitStack() as labs:
        yield lambda **options: labs.enter_context(Lab(**options))


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A laboratory with a NIC of four queues. Scope: one test."""
    return make_lab()
