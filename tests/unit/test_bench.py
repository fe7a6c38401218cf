"""The pure parts of the benchmark: figures, rounds, tables, charts, aims. No privileges."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tests.bench.aims import Aim, aims
from tests.bench.chart import Bar, Curve, bars, curves
from tests.bench.contest import (
    BITS,
    CPU_BYTES,
    CPU_FRAME,
    FRAMES,
    Comparison,
    Contestant,
    Outcome,
    Round,
    Score,
    Unavailable,
    contend,
)
from tests.bench.control import Reading
from tests.bench.figures import Spread, exponent, percentile, ratio, spread
from tests.bench.growth import Growth, growths
from tests.bench.tables import comparison_chart, control_table, growth_charts, growth_table, table
from tests.bench.wire import BRIDGE, OURS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([7.0], Spread(7, 7, 7), id="one"),
        pytest.param([4.0, 1.0, 2.0, 3.0, 5.0], Spread(3, 2, 4), id="odd"),
        pytest.param([1.0, 2.0, 3.0, 4.0], Spread(2.5, 1.75, 3.25), id="even"),
    ],
)
def test_spread(values: list[float], expected: Spread) -> None:
    assert spread(values) == expected


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine is ten times slower in the second round, for both: the ratio is as before."""
    assert ratio([2.0, 0.2, 3.0], [1.0, 0.1, 1.0]) == pytest.approx(2)
    assert ratio([2.0, 6.0], [0.0, 2.0]) == 3
    assert ratio([2.0, 6.0], [0.0, 0.0]) is None


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent(power: float) -> None:
    assert exponent([(size, 3 * size**power) for size in (1, 10, 100, 65_536)]) == pytest.approx(power)


def test_exponent_of_points_off_the_line() -> None:
    assert exponent([(1, 1), (10, 100), (100, 100)]) == pytest.approx(1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100)])
def test_percentile(share: float, expected: float) -> None:
    assert percentile(range(1, 101), share) == expected


def test_figures_of_a_round() -> None:
    assert Round(2.0, 1.0, frames=10, octets=2048, sent=20).figures() == {
        FRAMES.key: 5,
        CPU_FRAME.key: 1e8,
        BITS.key: 8192,
        CPU_BYTES.key: 5e8,
    }
    assert Round(2.0, further={"p99": 3.0}).figures() == {"p99": 3}
    assert Round(2.0, 1.0, frames=0, sent=5).figures() == {FRAMES.key: 0, CPU_FRAME.key: 1e9}


@dataclass(frozen=True)
class Weight:
    """A load."""

    name: str


@dataclass
class Field:
    """Contestants that say when they run, and note when they are taken down."""

    seen: list[str] = field(default_factory=list)

    def contestant(self, name: str, frames: int, refuses: str = "") -> Contestant[Weight]:
        def set_up(held: ExitStack) -> Callable[[Weight], Round]:
            if refuses == "everything":
                raise Unavailable("is ill")
            held.callback(self.seen.append, f"-{name}")

            def run(load: Weight) -> Round:
                if load.name == refuses:
                    raise Unavailable("is too heavy")
                self.seen.append(f"{name}{load.name}")
                return Round(1.0, 0.5, frames=frames, sent=10)

            return run

        return Contestant(name, set_up)

    def run(self, contestants: Sequence[Contestant[Weight]], *loads: str, most: int = 4) -> list[Outcome]:
        weights = [Weight(name) for name in loads]
        comparison = Comparison("c", "Title", contestants, weights, (FRAMES,), {"first": "a"}, 60, most)
        return contend(comparison)


def test_contestants_take_turns_there_and_back_and_the_first_time_does_not_count() -> None:
    race = Field()
    [one, two] = race.run([race.contestant("a", 10), race.contestant("b", 5)], "1", "2")
    warm = ["a1", "b1", "a2", "b2"]
    there, back = ["a1", "b1", "a2", "b2"], ["b1", "a1", "b2", "a2"]
    assert race.seen == [*warm, *there, *back, *there, *back, "-b", "-a"]
    assert (one.load, two.load, one.rounds) == ("1", "2", 4)
    last = one.score("b")
    assert last
    assert last.figures[FRAMES.key] == Spread(5, 5, 5)
    assert last.ratios == {"first": {FRAMES.key: 0.5, CPU_FRAME.key: 2}}
    assert (last.sent, last.lost) == (40, 20)


def test_who_cannot_take_part_is_named_with_the_reason() -> None:
    race = Field()
    contestants = [
        race.contestant("a", 10),
        race.contestant("b", 5, refuses="everything"),
        race.contestant("c", 5, refuses="2"),
    ]
    [one, two] = race.run(contestants, "1", "2")
    assert one.missing == {"b": "is ill"}
    assert two.missing == {"b": "is ill", "c": "is too heavy"}
    assert [score.name for score in two.scores] == ["a"]
    assert "  b: not here: is ill" in table(one).splitlines()


def test_a_budget_bounds_the_rounds_and_three_are_the_least() -> None:
    race = Field()
    comparison = Comparison("c", "Title", [race.contestant("a", 1)], [Weight("1")], (FRAMES,), {}, 0, 50)
    [outcome] = contend(comparison)
    assert outcome.rounds == 3


def outcome(comparison: str, load: str = "64 bytes", **rates: float) -> Outcome:
    """Rates in Mpps by contestant; the bridge's is 1."""
    rates = {name.replace("_", " "): rate for name, rate in rates.items()}
    rates = {BRIDGE: 1.0, **{OURS if name == "ours" else name: rate for name, rate in rates.items()}}
    scores = [
        Score(
            name,
            {
                FRAMES.key: Spread(rate * 1e6, rate * 0.9e6, rate * 1.1e6),
                CPU_FRAME.key: Spread(1e3 / rate, 1e3 / rate, 1e3 / rate),
            },
            {
                "bridge": {FRAMES.key: rate, CPU_FRAME.key: 1 / rate},
                "bare": {FRAMES.key: rate / 4, CPU_FRAME.key: 4 / rate},
            },
            1000,
            5,
        )
        for name, rate in rates.items()
    ]
    return Outcome(comparison, "Wire to VM", load, 3, (FRAMES, CPU_FRAME), scores, {"OVS": "not installed"})


def test_no_absolute_figure_is_without_its_ratio() -> None:
    """Each figure that counts stands before ratios, in a line of columns that are aligned."""
    title, head, *lines = table(outcome("wire-xdp", ours=4.0)).splitlines()
    assert title == "Wire to VM: 64 bytes (3 rounds)"
    assert [word.strip() for word in head.split("  ") if word.strip()] == [
        *("frames Mpps", "quartiles", "to bridge", "to bare"),
        *("CPU ns/frame", "to bridge", "lost"),
    ]
    assert lines[1].split("  ")[1] == OURS
    assert lines[1].split()[-7:] == ["4.00", "3.60-4.40", "4.00", "1.00", "250", "0.25", "0.50%"]
    assert len({len(line) for line in (head, *lines[:2])}) == 1
    assert lines[2] == "  OVS: not here: not installed"


def test_control_and_growth_have_ratios_too() -> None:
    readings = [Reading("scrape", size, "s", spread([0.01 * size])) for size in (10, 1000)]
    readings.append(Reading("start, cold", 10, "s", spread([2.0])))
    assert control_table(readings).splitlines() == [
        "Control, by ports (to the fewest)            10          1,000",
        "  scrape, s                        0.100 (1.00)  10.0 (100.00)",
        "  start, cold, s                    2.00 (1.00)              -",
    ]
    [scrape] = growths([], readings)
    assert scrape == Growth("scrape", "ports", "s", [(10, 0.1), (1000, 10.0)])
    assert growth_table([scrape]).splitlines()[1].split() == [
        *("scrape", "ports", "1.00", "10", "1,000"),
        *("100.00", "times"),
    ]


def test_growth_with_filters_is_by_cpu_per_frame() -> None:
    found = [outcome(f"wire-filters-{count}", "uniform", ours=2.0) for count in (100, 1, 4096)]
    ours, bridge = growths(found, [])
    assert ours.points == [(1, 500), (100, 500), (4096, 500)]
    assert (ours.name, bridge.name) == (
        f"CPU per frame, {OURS}, uniform",
        f"CPU per frame, {BRIDGE}, uniform",
    )
    assert ours.exponent == pytest.approx(0)


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> Iterator[str]:
    return (element.text or "" for element in drawn(svg).iter(f"{SVG}text"))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars("<A & B>", [("64", [Bar("one", 1, 0.5, 1.5, "1.00"), Bar("two", 2, 2, 2, "2.00", ours=True)])])
    first, second = [float(rect.get("width", "")) for rect in drawn(svg).iter(f"{SVG}rect")][1:]
    assert second == pytest.approx(2 * first)
    assert {"<A & B>", "64", "one", "two", "1.00", "2.00"} == set(texts(svg))


def test_curves_have_logarithmic_axes() -> None:
    svg = curves("Growth", "ports", "s", [Curve("scrape", [(10, 0.1), (100, 1), (1000, 10)])])
    [path] = drawn(svg).iter(f"{SVG}polyline")
    places = [tuple(map(float, place.split(","))) for place in path.get("points", "").split()]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert steps[0][0] > 0 > steps[0][1]
    assert {"10", "100", "1,000", "0.1"} <= set(texts(svg))


def test_a_comparison_is_drawn_by_ratios_to_its_first_base() -> None:
    svg = comparison_chart([outcome("wire-xdp", ours=4.0), outcome("wire-xdp", "1500 bytes", ours=2.0)])
    assert {"64 bytes", "1500 bytes", OURS, "4.00 (4.00 Mpps)", "2.00 (2.00 Mpps)"} <= set(texts(svg))
    widths = [float(rect.get("width", "")) for rect in drawn(svg).iter(f"{SVG}rect")][1:]
    assert widths == pytest.approx([widths[0], 4 * widths[0], widths[0], 2 * widths[0]], rel=0.01)


def test_growth_is_drawn_by_unit_with_its_exponent() -> None:
    points = [(10.0, 1.0), (1000.0, 10.0)]
    found = [Growth("scrape", "ports", "s", points), Growth("CPU, idle", "ports", "%", points)]
    charts = growth_charts(found)
    assert list(charts) == ["growth-ports-s", "growth-ports-per-cent"]
    assert "scrape: exponent 0.50" in texts(charts["growth-ports-s"])


@pytest.mark.parametrize(
    ("aim", "met", "verdict"),
    [
        pytest.param(Aim("a", 5, None), None, "not measured", id="not-measured"),
        pytest.param(Aim("a", 5, 4.0), True, "met: 4", id="at-most"),
        pytest.param(Aim("a", 5, 6.0), False, "missed: 6, 20% off", id="too-much"),
        pytest.param(Aim("a", 2, 2.5, True), True, "met: 2.5", id="at-least"),
        pytest.param(Aim("a", 2, 1.5, True), False, "missed: 1.5, 25% off", id="too-little"),
        pytest.param(Aim("a", 0, 3.0), False, "missed: 3", id="nothing-at-all"),
    ],
)
def test_verdict(aim: Aim, met: bool | None, verdict: str) -> None:
    assert aim.met is met
    assert aim.verdict() == verdict


def test_aims_are_looked_up_where_they_were_measured() -> None:
    found = aims(
        [outcome("wire-xdp", ours=3.9), outcome("wire-stack", ours=1.5)],
        [Reading("scrape", 1000, "s", spread([0.3])), Reading("scrape", 10, "s", spread([0.001]))],
    )
    measured = {aim.text: aim.found for aim in found if aim.found is not None}
    assert measured == {
        "wire to VM, 64 bytes, sink in XDP: 0.95 of bare redirect": pytest.approx(0.975),
        "wire to VM, 64 bytes, sink in a stack: 1.9 times the bridge": 1.5,
        "scrape of 1,000 ports: 250 ms": 0.3,
    }
    assert not any(math.isnan(aim.limit) for aim in found)
