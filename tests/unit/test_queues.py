"""Queue allocation: pure, no privileges."""

from __future__ import annotations

import pytest

from offload.queues import Queue, Request, allocate

A, B, C = Request("a", 100, "auto"), Request("b", 50, "auto"), Request("c", 100, "auto")


@pytest.mark.parametrize(
    ("requests", "held", "cpus", "limit", "expected"),
    [
        pytest.param([], {}, [0], None, {}, id="nobody"),
        pytest.param(
            [A, B, C],
            {},
            [0, 1],
            None,
            {"a": Queue(1, 0), "c": Queue(2, 1), "b": Queue(3, 0)},
            id="by-weight",
        ),
        pytest.param([A, B, C], {}, [0], 2, {"a": Queue(1, 0), "c": Queue(2, 0)}, id="limit-leaves-lightest"),
        pytest.param([A, B], {"b": Queue(1, 0)}, [0], 1, {"b": Queue(1, 0)}, id="holder-keeps"),
        pytest.param([A, C], {}, [0], 1, {"a": Queue(1, 0)}, id="freed-queue-goes-to-first-of-heaviest"),
        pytest.param([A], {}, [0], 0, {}, id="limit-zero"),
        pytest.param([Request("a", 1, "nic")], {}, [0, 1], None, {"a": Queue(1, None)}, id="cpu-of-nic"),
        pytest.param([Request("a", 1, 7)], {}, [0, 1], None, {"a": Queue(1, 7)}, id="pinned"),
        pytest.param(
            [Request("a", 9, 0), B],
            {},
            [0, 1],
            None,
            {"b": Queue(1, 1), "a": Queue(2, 0)},
            id="auto-avoids-pinned",
        ),
        pytest.param([A], {"a": Queue(4, 1)}, [0, 1], None, {"a": Queue(4, 1)}, id="keeps-number-and-cpu"),
        pytest.param([A], {"a": Queue(4, 5)}, [0, 1], None, {"a": Queue(4, 0)}, id="cpu-no-longer-allowed"),
        pytest.param(
            [A, B, C],
            {"a": Queue(1, 1), "b": Queue(3, 0)},
            [0, 1],
            None,
            {"a": Queue(1, 1), "b": Queue(3, 0), "c": Queue(2, 0)},
            id="hole-is-filled",
        ),
        pytest.param(
            [A, B],
            {"a": Queue(1, 0), "b": Queue(1, 0)},
            [0],
            None,
            {"a": Queue(1, 0), "b": Queue(2, 0)},
            id="number-brought-from-another-nic",
        ),
    ],
)
def test_allocate(
    requests: list[Request],
    held: dict[str, Queue],
    cpus: list[int],
    limit: int | None,
    expected: dict[str, Queue],
) -> None:
    assert allocate(requests, held, cpus, limit) == expected
