"""Covering arrays: few of many combinations, and still every pair of values that goes together.

A greedy construction, one row at a time, after Cohen and others, "The AETG system" (IEEE
Transactions on Software Engineering 23(7), 1997). Only combinations that are offered are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeVar

Row = TypeVar("Row", bound=tuple[object, ...])
_Choice = tuple[int, object]  # a column, and a value in it


def pairwise(rows: Sequence[Row]) -> list[Row]:
    """Some of ``rows`` such that any two values that stand together in a row do so in one of these.

    Rows are tuples of one length with hashable values. The same rows give the same choice.
    """
    holders = _holders(rows)
    missing = {pair: None for pair in combinations(holders, 2) if holders[pair[0]] & holders[pair[1]]}
    chosen: list[Row] = []
    while missing:
        row = _next_row(rows, holders, missing)
        chosen.append(row)
        for pair in combinations(enumerate(row), 2):
            missing.pop(pair, None)
    return chosen


def _holders(rows: Sequence[Row]) -> dict[_Choice, int]:
    """For every value of every column, in order of columns, a bit for each row that has it."""
    holders: dict[_Choice, int] = {}
    for column in range(len(rows[0]) if rows else 0):
        for number, row in enumerate(rows):
            choice = (column, row[column])
            holders[choice] = holders.get(choice, 0) | 1 << number
    return holders


def _next_row(
    rows: Sequence[Row], holders: dict[_Choice, int], missing: dict[tuple[_Choice, _Choice], None]
) -> Row:
    """A row with a missing pair, and in the other columns the values that miss most pairs with it."""
    row = list(next(iter(missing)))
    left = holders[row[0]] & holders[row[1]]
    while left & (left - 1):  # more than one row
        open_choices = [choice for choice in holders if choice not in row and _narrows(left, holders[choice])]
        if not open_choices:
            break

        def gain(choice: _Choice) -> int:
            return sum((min(choice, held), max(choice, held)) in missing for held in row)

        best = max(open_choices, key=gain)
        row.append(best)
        left &= holders[best]
    return rows[(left & -left).bit_length() - 1]


def _narrows(left: int, holder: int) -> bool:
    return left & holder not in (0, left)
