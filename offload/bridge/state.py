"""What became of the frames: RUN_DIR/bridges/SWITCH.stats.json, written every second, read by the controller.

Counters go on where the last process wrote them, so they do not go back when a bridge is restarted. What was
counted after its last writing is missing then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from offload.bridge.membership import membership_file
from offload.errors import OffloadError

VERSION = 1
STALE = 5.0
"""Seconds after which a file that nobody has written again tells of a bridge that is not running."""

_ROWS_PER_STEP = 64


@dataclass(frozen=True)
class MemberState:
    """One member. Seen from the bridge, ``rx``: frames that came from it, ``tx``: handed over for it.

    A GSO frame counts once. Bytes are without the conduit's tag and without FCS. ``drops`` are by reason:
    of what came from it ``vlan``, ``link_local``, ``flood_limit``, ``nowhere`` (nobody to flood to),
    ``same_port`` (its destination is where it came from), ``extension``, ``malformed``; of what was for it
    ``too_big``, ``device_full``, ``device_down``, ``refused``. ``station_limit`` counts addresses that were
    not learnt.
    """

    id: int
    name: str
    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StationState:
    """An address and the member it is behind. ``age``: seconds since it sent, ``None`` when declared."""

    mac: str
    vid: int
    member: str
    age: float | None


@dataclass(frozen=True)
class ExtensionState:
    """An extension. ``reason``: why it is off, or its last failure. ``counters`` are its own.

    Unlike the bridge's, its counters begin anew with each worker.
    """

    name: str
    state: Literal["on", "off"]
    reason: str
    calls: int
    failures: int
    drops: int
    redirects: int
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Restarts:
    """How often a worker followed another: for an extension's sake, for others in the config, for nothing
    that is known.
    """

    extension: int = 0
    config: int = 0
    other: int = 0


@dataclass(frozen=True)
class BridgeState:
    """A whole file. ``written`` is the wall clock's time in seconds.

    ``bound``: the inner device is there and read. ``config_error``: why the newest membership is not in
    force. ``drops``: ``ring`` is what came while the ring was full, ``unknown_member`` bore a tag of
    nobody, ``malformed`` no tag of the conduit, or was cut off.
    """

    switch: str
    pid: int
    written: float
    inner: str
    bound: bool
    config_error: str = ""
    restarts: Restarts = Restarts()
    drops: Mapping[str, int] = field(default_factory=dict)
    members: tuple[MemberState, ...] = ()
    extensions: tuple[ExtensionState, ...] = ()
    stations: tuple[StationState, ...] = ()

    @property
    def running(self) -> bool:
        """Whether the bridge wrote this a moment ago."""
        return time.time() - self.written < STALE


def state_file(run_dir: Path, switch: str) -> Path:
    """Where the state of ``switch`` is."""
    return membership_file(run_dir, switch).with_name(f"{switch}.stats.json")


def read(run_dir: Path, switch: str) -> BridgeState:
    """The state of a bridge as last written; ``running`` says whether that was a moment ago.

    Raises FileNotFoundError when it never was, OffloadError when it cannot be read or understood.
    """
    file = state_file(run_dir, switch)
    try:
        data = json.loads(file.read_text())
        if data.pop("version") != VERSION:
            raise OffloadError(f"{file}: written by another version of offload; restart the bridge")
        return BridgeState(
            **data
            | {
                "restarts": Restarts(**data["restarts"]),
                "members": tuple(MemberState(**item) for item in data["members"]),
                "extensions": tuple(ExtensionState(**item) for item in data["extensions"]),
                "stations": tuple(StationState(*item) for item in data["stations"]),
            }
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OffloadError(f"{file}: cannot be read: {error!r}") from error


def write(run_dir: Path, state: BridgeState, stations: Iterable[StationState]) -> Iterator[None]:
    """Write the file, a little at each step of the iterator, since frames are waiting.

    It appears under its name with the last step. ``stations`` takes the place of the state's own.
    """
    file = state_file(run_dir, state.switch)
    draft = file.with_name(f"{file.name}.new")
    with draft.open("w") as out:
        head = asdict(state)
        members, _ = head.pop("members"), head.pop("stations")
        out.write(json.dumps({"version": VERSION, **head})[:-1])
        for name, rows in (("members", iter(members)), ("stations", (_row(item) for item in stations))):
            out.write(f', "{name}": [')
            comma = ""
            for number, row in enumerate(rows, 1):
                out.write(comma + json.dumps(row))
                comma = ",\n"
                if number % _ROWS_PER_STEP == 0:
                    yield
            out.write("]")
        out.write("}\n")
    os.replace(draft, file)


def _row(station: StationState) -> list[str | int | float | None]:
    return [station.mac, station.vid, station.member, station.age]
