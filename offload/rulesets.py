"""Rules of a bridge's packet filters, and whether any of them is for a device. Pure.

Only what a rule says about interfaces is looked at: whatever else it matches, it may be for any
device's frames. Forms: libnftables-json(5), and what ``ebtables -L`` prints (ebtables(8)).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_INTERFACES = frozenset({"iif", "iifname", "oif", "oifname", "ibrname", "obrname"})
_GO_ON = frozenset({"accept", "return", "continue"})
_JUMPS = frozenset({"jump", "goto"})
_EBTABLES_INTERFACES = frozenset({"-i", "-o", "--logical-in", "--logical-out"})


@dataclass(frozen=True)
class Names:
    """What a rule asks of one interface: a name among these or with one of these beginnings.

    ``other``: any name but those.
    """

    exact: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()
    other: bool = False

    def admit(self, name: str) -> bool:
        return (name in self.exact or name.startswith(self.beginnings)) != self.other


@dataclass(frozen=True)
class Rule:
    """``asks`` must all be met. ``target`` is the chain where the frame goes on, ``None``: it acts itself."""

    asks: tuple[Names, ...]
    target: str | None = None

    def concerns(self, device: str, around: Collection[str]) -> bool:
        """Whether it is for frames from or to ``device``.

        ``around`` are interfaces that the device's frames pass on their way: its bridge and the uplink.
        """
        if any(names.admit(device) and not names.other for names in self.asks):
            return True
        return all(any(names.admit(name) for name in (device, *around)) for names in self.asks)


class Chain:
    """Rules in a form where those for one device are found without looking at all others."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._anyone: list[Rule] = []
        self._by_name: defaultdict[str, list[Rule]] = defaultdict(list)
        for rule in rules:
            self.append(rule)

    def append(self, rule: Rule) -> None:
        if rule.asks and not any(names.beginnings or names.other for names in rule.asks):
            for name in frozenset().union(*(names.exact for names in rule.asks)):
                self._by_name[name].append(rule)
        else:
            self._anyone.append(rule)

    def concerning(self, device: str, around: Collection[str]) -> Iterator[Rule]:
        """Every rule that concerns ``device``; one that names several of its interfaces may come again."""
        for rules in (self._anyone, *(self._by_name.get(name, ()) for name in (device, *around))):
            yield from (rule for rule in rules if rule.concerns(device, around))


@dataclass(frozen=True)
class Table:
    """Chains by name. ``hooked`` are those that frames enter by; ``True`` where the policy is to drop."""

    name: str
    chains: Mapping[str, Chain]
    hooked: Mapping[str, bool]

    def concerning(self, device: str, around: Collection[str]) -> list[str]:
        """The hooked chains that do something to frames of ``device``."""
        return [
            name for name, drops in self.hooked.items() if drops or self._acts(name, device, around, set())
        ]

    def _acts(self, chain: str, device: str, around: Collection[str], seen: set[str]) -> bool:
        if chain in seen or chain not in self.chains:
            return False
        seen.add(chain)
        return any(
            rule.target is None or self._acts(rule.target, device, around, seen)
            for rule in self.chains[chain].concerning(device, around)
        )


def of_nft(document: str) -> list[Table]:
    """The tables of ``nft --json list ruleset``. Raises ValueError when that is not what it is."""
    try:
        items = [next(iter(item.items())) for item in json.loads(document)["nftables"]]
        elements = {
            (about["table"], f"@{about['name']}"): about.get("elem", ())
            for kind, about in items
            if kind in ("set", "map")
        }
        names = [about["name"] for kind, about in items if kind == "table"]
        chains: dict[str, dict[str, Chain]] = {name: {} for name in names}
        hooked: dict[str, dict[str, bool]] = {name: {} for name in names}
        for kind, about in items:
            if kind == "chain":
                chains[about["table"]][about["name"]] = Chain()
                if "hook" in about:
                    hooked[about["table"]][about["name"]] = about.get("policy") == "drop"
        for kind, about in items:
            if kind == "rule":
                for rule in _nft_rules(about, elements):
                    chains[about["table"]][about["chain"]].append(rule)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, IndexError) as error:
        raise ValueError(f"unexpected form of nft's output: {error!r}") from error
    return [Table(name, chains[name], hooked[name]) for name in names]


def _nft_rules(about: Mapping[str, Any], elements: Mapping[tuple[str, str], Any]) -> Iterator[Rule]:
    """One rule for each way on that it has; none when all it does is to let the frame pass."""
    asks: list[Names] = []
    ways: list[Rule] = []
    statements = []
    for expression in about["expr"]:
        kind, what = _keyed(expression)
        if kind == "match":
            asks += _asked(what["left"], what["op"], _elements(what["right"], about["table"], elements))
        elif kind == "vmap":
            ways += _verdicts(what["key"], _elements(what["data"], about["table"], elements))
            statements.append("continue")
        elif kind in _JUMPS:
            ways.append(Rule((), what["target"]))
        elif kind != "counter":
            statements.append(kind)
    for way in ways:
        yield Rule((*asks, *way.asks), way.target)
    if not ways and not (statements and _GO_ON.issuperset(statements)):
        yield Rule(tuple(asks))


def _keyed(expression: Any) -> tuple[str, Any]:
    """A statement's kind and what belongs to it: ``{"jump": {…}}``, or a bare word."""
    if isinstance(expression, str):
        return expression, None
    ((kind, what),) = expression.items()
    return kind, what


def _elements(data: Any, table: str, elements: Mapping[tuple[str, str], Any]) -> list[Any]:
    if isinstance(data, str) and data.startswith("@"):
        return list(elements.get((table, data), ()))
    return list(data["set"]) if isinstance(data, dict) and "set" in data else [data]


def _asked(left: Any, op: str, values: Iterable[Any]) -> Iterator[Names]:
    """What a match asks of interfaces; nothing if it is about something else."""
    for place in _interface_places(left):
        yield _names((_value(value, place) for value in values), other=op == "!=")


def _verdicts(key: Any, pairs: Iterable[Any]) -> Iterator[Rule]:
    places = list(_interface_places(key))
    for value, verdict in pairs:
        kind, what = _keyed(verdict)
        if kind not in _GO_ON:
            asks = tuple(_names([_value(value, place)]) for place in places)
            yield Rule(asks, what["target"] if kind in _JUMPS else None)


def _interface_places(left: Any) -> Iterator[int | None]:
    """Where in a key the interfaces are: ``None`` for the whole of it, or an index into a concatenation."""
    parts = left.get("concat") if isinstance(left, dict) else None
    for place, part in enumerate(parts) if parts else [(None, left)]:
        if isinstance(part, dict) and part.get("meta", {}).get("key") in _INTERFACES:
            yield place


def _value(value: Any, place: int | None) -> str:
    if isinstance(value, dict) and "elem" in value:
        value = value["elem"]["val"]
    if place is not None and isinstance(value, dict):
        value = value["concat"][place]
    return str(value)


def _names(values: Iterable[str], other: bool = False, wildcard: str = "*") -> Names:
    listed = list(values)
    return Names(
        frozenset(value for value in listed if not value.endswith(wildcard)),
        tuple(value.removesuffix(wildcard) for value in listed if value.endswith(wildcard)),
        other,
    )


def of_ebtables(listing: str) -> Table:
    """The table of ``ebtables -t TABLE -L``. Raises ValueError when that is not what it is."""
    name, _, rest = listing.strip().partition("\n")
    if not name.startswith("Bridge table: "):
        raise ValueError(f"unexpected form of ebtables' output: {name!r}")
    chains: dict[str, Chain] = {}
    hooked: dict[str, bool] = {}
    chain = ""
    for line in rest.splitlines():
        if line.startswith("Bridge chain: "):
            chain, _, about = line.removeprefix("Bridge chain: ").partition(",")
            chains[chain] = Chain()
            if chain.isupper():  # the built-in ones; of others the policy is what a jump falls back to
                hooked[chain] = about.endswith("DROP")
        elif line:
            for rule in _ebtables_rule(line.split()):
                chains[chain].append(rule)
    return Table(name.removeprefix("Bridge table: "), chains, hooked)


def _ebtables_rule(words: list[str]) -> Iterator[Rule]:
    asks = []
    for index, word in enumerate(words):
        if word in _EBTABLES_INTERFACES:
            other = words[index + 1] == "!"
            asks.append(_names([words[index + 2 if other else index + 1]], other, wildcard="+"))
    target = words[words.index("-j") + 1]
    if target.lower() not in _GO_ON:
        builtin = target.isupper() or target in ("arpreply", "dnat", "snat", "mark", "redirect")
        yield Rule(tuple(asks), None if builtin else target)
