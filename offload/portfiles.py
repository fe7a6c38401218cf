"""Ports that come as files: ``NAME.yaml`` in STATE_DIR/ports.d (kept) and RUN_DIR/ports.d (until reboot)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config import PortConfig, dump, parse_port
from .errors import OffloadError
from .paths import Paths


@dataclass(frozen=True)
class PortFile:
    """A port of a file. ``source``: ``keep`` survives a reboot, ``run`` does not."""

    source: Literal["keep", "run"]
    port: PortConfig


def load(paths: Paths) -> dict[str, PortFile]:
    """Every port of a file; of two files for one port the kept one wins. Raises ``ConfigError``."""
    found: dict[str, PortFile] = {}
    directories: tuple[tuple[Literal["keep", "run"], Path], ...] = (
        ("keep", paths.state_ports),
        ("run", paths.run_ports),
    )
    for source, directory in directories:
        if not directory.is_dir():
            continue
        for file in sorted(directory.glob("*.yaml")):
            if file.stem not in found:
                found[file.stem] = PortFile(source, parse_port(file.stem, _read(file), str(file)))
    return found


def save(paths: Paths, before: Mapping[str, PortFile], after: Mapping[str, PortFile]) -> None:
    """Make the files say ``after``; they say ``before`` now."""
    for name in before.keys() - after.keys():
        _file(paths, name, before[name]).unlink(missing_ok=True)
    for name, entry in after.items():
        if (was := before.get(name)) is not entry and was != entry:
            file = _file(paths, name, entry)
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            draft = file.with_suffix(".new")
            draft.write_text(dump(entry.port))
            draft.replace(file)


def _file(paths: Paths, name: str, entry: PortFile) -> Path:
    return (paths.state_ports if entry.source == "keep" else paths.run_ports) / f"{name}.yaml"


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OffloadError(f"could not read {file}: {error}") from error
