"""What was found, for people and as charts. Pure. No absolute figure is without a ratio beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tests.bench.chart import Bar, Curve, bars, curves
from tests.bench.contest import Figure, Outcome, Score
from tests.bench.control import Reading
from tests.bench.growth import Growth


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows if at < len(row)) for at in range(max(map(len, rows)))]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def table(outcome: Outcome) -> str:
    """One load's outcome: figures and ratios, what was lost, and who is missing."""
    called = list(dict.fromkeys(base for score in outcome.scores for base in score.ratios))
    counts = any(score.sent for score in outcome.scores)
    head = [""]
    for at, figure in enumerate(outcome.figures):
        columns = ["quartiles", *(f"to {base}" for base in called)]
        head += [f"{figure.label} {figure.unit}", *_chosen(at, columns)]
    rows = [[*head, *(["lost"] if counts else [])]]
    for score in outcome.scores:
        row = [f"  {score.name}"]
        for at, figure in enumerate(outcome.figures):
            median, *columns = _cells(score, figure, called)
            row += [median, *_chosen(at, columns)]
        rows.append([*row, *([f"{score.lost / max(score.sent, 1):.2%}"] if counts else [])])
    missing = [f"  {name}: not here: {why}" for name, why in outcome.missing.items()]
    return "\n".join([f"{outcome.title}: {outcome.load} ({outcome.rounds} rounds)", *aligned(rows), *missing])


def _chosen(at: int, columns: Sequence[str]) -> Sequence[str]:
    """Of quartiles and ratios: all for the first figure, the first ratio for the others."""
    return columns if at == 0 else columns[1:2]


def _cells(score: Score, figure: Figure, called: Sequence[str]) -> list[str]:
    found = score.figures.get(figure.key)
    if found is None:
        return ["-", "-", *("-" for _ in called)]
    low, middle, high = (value * figure.scale for value in (found.low, found.median, found.high))
    ratios = (score.ratios.get(base, {}).get(figure.key) for base in called)
    return [_number(middle), f"{_number(low)}-{_number(high)}", *map(_ratio, ratios)]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def control_table(readings: Sequence[Reading]) -> str:
    """A row for each reading, a column for each size; in brackets the ratio to the smallest size."""
    sizes = sorted({reading.size for reading in readings})
    found = {(reading.name, reading.size): reading for reading in readings}
    rows = [["Control, by ports (to the fewest)", *(f"{size:,}" for size in sizes)]]
    for name in dict.fromkeys(reading.name for reading in readings):
        mine = [found.get((name, size)) for size in sizes]
        first = next(reading for reading in mine if reading)
        rows.append([f"  {name}, {first.unit}", *(_beside(reading, first) for reading in mine)])
    return "\n".join(aligned(rows))


def _beside(reading: Reading | None, first: Reading) -> str:
    if reading is None:
        return "-"
    median, base = reading.spread.median, first.spread.median
    return f"{_number(median)} ({median / base:.2f})" if base else f"{_number(median)} (-)"


def growth_table(growths: Sequence[Growth]) -> str:
    """Each growth with its exponent: 0 is none, 1 in proportion."""
    rows = [["Growth", "with", "exponent", "from", "to", "figure grew by"]]
    for growth in growths:
        (first, low), (last, high) = growth.points[0], growth.points[-1]
        grew = f"{high / low:.2f} times"
        rows.append(
            [f"  {growth.name}", growth.of, f"{growth.exponent:.2f}", f"{first:,.0f}", f"{last:,.0f}", grew]
        )
    return "\n".join(aligned(rows))


def comparison_chart(outcomes: Sequence[Outcome]) -> str:
    """The figure that counts of all loads of one comparison, as ratios to the first base there is."""
    figure, title = outcomes[0].figures[0], outcomes[0].title
    base = next((base for score in outcomes[0].scores for base in score.ratios), "")
    groups = []
    for outcome in outcomes:
        group = []
        for score in outcome.scores:
            found, to_base = score.figures.get(figure.key), score.ratios.get(base, {}).get(figure.key)
            if found is None or to_base is None or not found.median:
                continue
            unit = to_base / found.median
            told = f"{to_base:.2f} ({_number(found.median * figure.scale)} {figure.unit})"
            ours = score.name.startswith("ours")
            group.append(Bar(score.name, to_base, found.low * unit, found.high * unit, told, ours))
        groups.append((outcome.load, group))
    better = "less" if figure.less_is_better else "more"
    return bars(f"{title}: {figure.label}, ratio to {base} ({better} is better)", groups)


def growth_charts(growths: Sequence[Growth]) -> dict[str, str]:
    """A chart for each kind of size and unit, by name."""
    kinds = dict.fromkeys((growth.of, growth.unit) for growth in growths)
    charts = {}
    for of, unit in kinds:
        mine = [growth for growth in growths if (growth.of, growth.unit) == (of, unit)]
        lines = [Curve(f"{growth.name}: exponent {growth.exponent:.2f}", growth.points) for growth in mine]
        word = {"%": "per-cent"}.get(unit, unit)
        charts[f"growth-{of}-{word}"] = curves(f"Growth with {of}", of, unit, lines)
    return charts
