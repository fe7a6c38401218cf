"""Charts as SVG, by hand: bars of ratios, and curves on logarithmic axes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, LINE = 900, 350, 170, 46, 20
_COLOURS = ("#3b6ea5", "#c0562f", "#4c8c4a", "#8a5a9e", "#b08d2c", "#3f9a9a", "#a04a6a", "#6b6b6b")
_OURS, _OTHERS = _COLOURS[1], _COLOURS[0]


@dataclass(frozen=True)
class Bar:
    """``value`` with ``low`` and ``high`` around it; ``told`` is written at its end."""

    label: str
    value: float
    low: float
    high: float
    told: str
    ours: bool = False


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Horizontal bars in groups that share an axis from 0. Whiskers are from ``low`` to ``high``."""
    most = max((bar.high for _, group in groups for bar in group), default=0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    parts, y = [], float(TOP)
    for name, group in groups:
        parts.append(_text(10, y + 14, name, weight="bold"))
        y += LINE
        for bar in group:
            middle, colour = y + LINE / 2, _OURS if bar.ours else _OTHERS
            parts += [
                _text(LEFT - 8, middle + 4, bar.label, anchor="end"),
                f'<rect x="{LEFT}" y="{y + 3:.1f}" width="{bar.value * scale:.1f}" height="{LINE - 6}" '
                f'fill="{colour}"/>',
                _line(LEFT + bar.low * scale, middle, LEFT + bar.high * scale, middle, "#222"),
                _text(LEFT + bar.high * scale + 6, middle + 4, bar.told),
            ]
            y += LINE
        y += LINE / 2
    return _document(title, y + 6, parts)


@dataclass(frozen=True)
class Curve:
    """Points ``(x, y)``, all positive, with ascending x."""

    label: str
    points: Sequence[tuple[float, float]]


def curves(title: str, x_label: str, y_label: str, lines: Sequence[Curve]) -> str:
    """Curves on logarithmic axes, with a line for each power of ten and a legend below."""
    left, height, bottom = 90, 300, TOP + 300
    x_low, x_high = _decades([x for curve in lines for x, _ in curve.points])
    y_low, y_high = _decades([y for curve in lines for _, y in curve.points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low) * (WIDTH - left - 40)
        up = (math.log10(y) - y_low) / (y_high - y_low) * height
        return left + across, bottom - up

    parts = []
    for power in range(x_low, x_high + 1):
        x, _ = place(10.0**power, 10.0**y_low)
        parts += [_line(x, TOP, x, bottom, "#ddd"), _text(x, bottom + 16, _power(power), anchor="middle")]
    for power in range(y_low, y_high + 1):
        _, y = place(10.0**x_low, 10.0**power)
        parts += [_line(left, y, WIDTH - 40, y, "#ddd"), _text(left - 8, y + 4, _power(power), anchor="end")]
    parts += [_text(WIDTH - 40, bottom + 32, x_label, anchor="end"), _text(10, TOP - 8, y_label)]
    for number, curve in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        legend = bottom + 40 + number * LINE
        parts += [
            _line(left, legend + 10, left + 24, legend + 10, colour, 3),
            _text(left + 32, legend + 14, curve.label),
        ]
    return _document(title, bottom + 52 + len(lines) * LINE, parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten below and above all values."""
    low = math.floor(math.log10(min(values)))
    return low, max(math.ceil(math.log10(max(values))), low + 1)


def _power(power: int) -> str:
    return f"{10**power:,}" if 0 <= power < 6 else f"{10.0**power:g}"


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def _document(title: str, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="sans-serif" font-size="13">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, ground, _text(10, 22, title, weight="bold"), *parts, "</svg>", ""])
