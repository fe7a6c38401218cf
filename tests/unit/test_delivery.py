"""When TCP is merged on its way to a port, and when no longer: samples in, a choice out."""

from __future__ import annotations

import pytest

from offload.delivery import ENOUGH, LONGEST_PAUSE, PAUSE, PROVEN, STREAK, Choice, Sample

BULK = Sample(frames=ENOUGH, octets=1500 * ENOUGH, left=0, pieces=0)
SMALL = Sample(frames=10 * ENOUGH, octets=640 * ENOUGH, left=0, pieces=0)
QUIET = Sample(frames=ENOUGH - 1, octets=1500 * ENOUGH, left=0, pieces=0)
MERGES = Sample(frames=10 * ENOUGH, octets=640 * ENOUGH, left=ENOUGH, pieces=ENOUGH // 40)
ALONE = Sample(frames=0, octets=0, left=ENOUGH, pieces=ENOUGH)
RESTS = Sample(frames=0, octets=0, left=ENOUGH - 1, pieces=ENOUGH - 1)


def judged(choice: Choice, samples: list[Sample], merging: bool, now: float = 1000.0) -> list[bool | None]:
    return [choice.judge(sample, merging, now) for sample in samples]


@pytest.mark.parametrize(
    ("samples", "merging", "answers"),
    [
        pytest.param([BULK, BULK], False, [None, True], id="long-frames-are-tried"),
        pytest.param([BULK, QUIET, BULK], False, [None, None, True], id="a-pause-says-nothing"),
        pytest.param([BULK, SMALL, BULK], False, [None, None, None], id="they-must-agree"),
        pytest.param([SMALL] * 5, False, [None] * 5, id="small-frames"),
        pytest.param([MERGES] * 5, True, [None] * 5, id="what-merges-stays"),
        pytest.param([ALONE, ALONE], True, [None, False], id="what-does-not-goes"),
        pytest.param([ALONE, RESTS, ALONE], True, [None, None, False], id="a-pause-then"),
        pytest.param([ALONE, MERGES, ALONE], True, [None, None, None], id="they-must-agree-then"),
    ],
)
def test_a_choice(samples: list[Sample], merging: bool, answers: list[bool | None]) -> None:
    assert judged(Choice(), samples, merging) == answers


def test_failed_trials_become_rare() -> None:
    """Each one waits twice as long as the last, up to a limit; one that proved itself counts for nothing."""
    choice, now = Choice(), 1000.0
    pauses = []
    for _ in range(9):
        assert judged(choice, [BULK] * STREAK, False, now)[-1] is True
        assert judged(choice, [ALONE] * STREAK, True, now + 3)[-1] is False
        left = now + 3
        while judged(choice, [BULK] * STREAK, False, now)[-1] is None:
            now += 5
        assert judged(choice, [ALONE] * STREAK, True, now)[-1] is False
        pauses.append(now - left)
        now += LONGEST_PAUSE
    assert pauses[0] >= 2 * PAUSE
    assert pauses == sorted(pauses)
    assert LONGEST_PAUSE <= pauses[-1] < LONGEST_PAUSE + 10
    assert judged(choice, [BULK] * STREAK, False, now)[-1] is True
    assert judged(choice, [ALONE] * STREAK, True, now + PROVEN)[-1] is False
    assert judged(choice, [BULK] * STREAK, False, now + PROVEN + PAUSE - 1)[-1] is None
    assert judged(choice, [BULK] * STREAK, False, now + PROVEN + PAUSE)[-1] is True


def test_it_says_why() -> None:
    choice = Choice()
    judged(choice, [BULK] * STREAK, False)
    assert choice.why == "the mean frame has 1500 bytes"
    judged(choice, [ALONE] * STREAK, True)
    assert choice.why == "1.0 frames became one"
