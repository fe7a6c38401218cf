"""A YAML document as plain data, with the text behind every value.

Only what a config needs of YAML 1.2 is taken: mappings, sequences and scalars.
``true``, ``false``, ``null`` and decimal whole numbers are what they look like,
every other scalar is text, and so is every key. That keeps ``off`` and
``02:15:5d:00:00:01`` text, in whatever YAML version the file says it is.

Anchors, aliases and tags are refused, nothing is ever constructed from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from offload.errors import ConfigError, Problem

Location = tuple[str | int, ...]

MAX_BYTES = 8 * 1024 * 1024
# The grammar is six levels deep; a limit keeps "[[[[…" from exhausting the stack.
MAX_DEPTH = 16
SHOWN_CHARS = 60

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}")
_CONSTANTS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def dotted(location: Location) -> str:
    """``("ports", "web.1", "mac", 0)`` becomes ``ports."web.1".mac[0]``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            key = part if _PLAIN_KEY.fullmatch(part) else json.dumps(part)
            path += f".{key}" if path else key
    return path


@dataclass(frozen=True)
class Document:
    """Plain data, and where its values stand in ``text``.

    ``spans`` holds start and end (characters) of every scalar and every value in
    flow style. ``problems`` are the duplicate keys; the first one's value was kept.
    Data that never was text (a request's JSON) has an empty ``text``.
    """

    data: object
    text: str = ""
    spans: Mapping[Location, tuple[int, int]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def shown(self, location: Location, value: object) -> str:
        """What stands at ``location`` in the words of the file, else ``value`` in words; one short line."""
        span = self.spans.get(location)
        shown = _in_words(value) if span is None else self.text[slice(*span)]
        shown = " ".join(shown.split()) or "(empty)"
        return shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 1] + "…"


def _in_words(value: object) -> str:
    match value:
        case Mapping():
            return "a mapping"
        case list() | tuple() | frozenset():
            return "a list"
        case str() if value.isascii() and value.isprintable() and value:
            return value
        case str() | int() | float() | None:
            return json.dumps(value)
        case _:
            return type(value).__name__


def load(text: str, source: str, prefix: Location = ()) -> Document:
    """Read one YAML document, whose values are told as if it stood at ``prefix`` of a larger one.

    Raises ConfigError for a syntax error (with line and column), more than 8 MiB, an
    anchor, alias or tag, a second document, and nesting beyond what a config can need.
    Duplicate keys are left in ``Document.problems`` so that they are told with the rest.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ConfigError([Problem("size", "", f"at most {MAX_BYTES // 1024**2} MiB")], source)
    try:
        return _Reader(text).document(prefix)
    except _RefusedError as error:
        raise ConfigError([error.problem], source) from error


class _RefusedError(Exception):
    """What ends the reading of a document."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.problem = Problem(where, "", reason)


def _position(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _events(text: str) -> Iterator[Any]:
    """ruamel.yaml's events, one at a time and with nothing expanded; what it raises is told in our words."""
    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "line 1" if mark is None else _position(mark)
        raise _RefusedError(where, f"YAML syntax: {error.problem or error.context}") from error
    except ReaderError as error:
        where = f"line {text.count(chr(10), 0, error.position) + 1}"
        reason = f"YAML syntax: character U+{error.character:04X} is not allowed"
        raise _RefusedError(where, reason) from error
    # Two things that ruamel.yaml does not turn into errors of its own: chr() of an escape
    # such as "\UFFFFFFFF", and a %YAML directive of a version that does not exist.
    except (ValueError, OverflowError) as error:
        reason = "YAML syntax: an escape sequence stands for no character"
        raise _RefusedError("the file", reason) from error
    except AssertionError as error:
        raise _RefusedError("the file", f"YAML syntax: {error}") from error


class _Reader:
    """Builds plain data from events."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._events = _events(text)
        self._spans: dict[Location, tuple[int, int]] = {}
        self._problems: list[Problem] = []

    def document(self, prefix: Location) -> Document:
        data: object = None
        documents = 0
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _RefusedError(_position(event.start_mark), "one document only")
                data = self._value(next(self._events), prefix)
        return Document(data, self._text, self._spans, tuple(self._problems))

    def _value(self, event: Any, location: Location) -> object:
        _refuse_references(event)
        if len(location) > MAX_DEPTH:
            raise _RefusedError(_position(event.start_mark), f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, ScalarEvent):
            self._spans[location] = (event.start_mark.index, event.end_mark.index)
            return _scalar(event)
        start, in_flow = event.start_mark.index, event.flow_style
        value: object
        if isinstance(event, SequenceStartEvent):
            value, end = self._sequence(location)
        else:
            assert isinstance(event, MappingStartEvent)
            value, end = self._mapping(location)
        if in_flow:
            self._spans[location] = (start, end)
        return value

    def _sequence(self, location: Location) -> tuple[list[object], int]:
        items: list[object] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                return items, event.end_mark.index
            items.append(self._value(event, (*location, len(items))))
        raise AssertionError("a sequence start has its end")

    def _mapping(self, location: Location) -> tuple[dict[str, object], int]:
        items: dict[str, object] = {}
        lines: dict[str, int] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                return items, event.end_mark.index
            if isinstance(event, MappingStartEvent | SequenceStartEvent):
                raise _RefusedError(_position(event.start_mark), "a key must be text")
            _refuse_references(event)
            key, line = event.value, event.start_mark.line + 1
            if key not in items:
                lines[key] = line
                items[key] = self._value(next(self._events), (*location, key))
                continue
            reason = f"duplicate key on line {line}; it is already on line {lines[key]}"
            self._problems.append(Problem(dotted((*location, key)), "", reason))
            kept, self._spans = self._spans, {}
            self._value(next(self._events), (*location, key))
            self._spans = kept
        raise AssertionError("a mapping start has its end")


def _refuse_references(event: Any) -> None:
    # An alias, too, carries the name of its anchor.
    if event.anchor is not None:
        raise _RefusedError(
            _position(event.start_mark), "anchors and aliases are not allowed: write the value out"
        )
    if event.tag is not None:
        raise _RefusedError(_position(event.start_mark), f"tags are not allowed: remove {event.tag}")


def _scalar(event: Any) -> object:
    text: str = event.value
    if event.style:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    return int(text) if _NUMBER.fullmatch(text) else text
