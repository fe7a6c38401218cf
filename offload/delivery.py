"""Whether TCP for a port is merged (GRO) before the port's device gets it. Pure: samples in, a choice out.

Bulk gains by it: some forty segments pass the stack as one. What cannot be merged (acknowledgements,
requests, floods) loses by it: each frame alone takes the long way that XDP saves. Which of the two the TCP of
a port is shows when it is tried. So long frames are the occasion to try, and how many were merged tells
whether it stays. All TCP of a port goes one way, so that no flow is split.
"""

from __future__ import annotations

from dataclasses import dataclass

ENOUGH = 5_000
"""Frames that a sample must have to tell something; of fewer it does not matter which way they go."""
LONG = 500
"""Bytes of the mean frame from which there may be bulk TCP among them."""
WORTH = 8
"""Segments that must become one. One alone costs 2.5 us more than a redirect, one among forty 0.3 less."""
STREAK = 2
"""Samples that must agree; those that say nothing are passed over."""
PAUSE, LONGEST_PAUSE = 10.0, 640.0
"""Seconds until merging is tried again: at first, and at most. Each trial that fails doubles it."""
PROVEN = 60.0
"""Seconds of merging that make the next pause a short one again."""


@dataclass(frozen=True)
class Sample:
    """What went to a port since the sample before.

    ``frames`` of ``octets`` bytes in all were handed over as they came. ``left`` were left to GRO,
    which made ``pieces`` of them.
    """

    frames: int
    octets: int
    left: int
    pieces: int


class Choice:
    """One port. ``why`` says what the latest decision rests on."""

    def __init__(self) -> None:
        self.why = ""
        self._streak = 0
        self._pause = PAUSE
        self._not_before = 0.0
        self._since = 0.0

    def judge(self, sample: Sample, merging: bool, now: float) -> bool | None:
        """Whether TCP shall be merged from now on; ``None``: as before, which is ``merging``.

        ``now`` is in seconds of a clock that only goes forward.
        """
        if (sample.left if merging else sample.frames) < ENOUGH or now < self._not_before:
            return None
        other = sample.left < WORTH * sample.pieces if merging else sample.octets >= LONG * sample.frames
        self._streak = self._streak + 1 if other else 0
        if self._streak < STREAK:
            return None
        self._streak = 0
        if merging:
            self._pause = PAUSE if now - self._since >= PROVEN else min(2 * self._pause, LONGEST_PAUSE)
            self._not_before = now + self._pause
            self.why = f"{sample.left / max(sample.pieces, 1):.1f} frames became one"
        else:
            self._since = now
            self.why = f"the mean frame has {sample.octets / sample.frames:.0f} bytes"
        return not merging
