"""What the figures were measured on, in one sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VULNERABILITIES = Path("/sys/devices/system/cpu/vulnerabilities")


def machine() -> dict[str, str | int | list[str]]:
    """CPU model, CPUs, kernel release, and the mitigations that are in force."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    mitigations = []
    for path in sorted(_VULNERABILITIES.iterdir()):
        state = path.read_text().strip()
        if state.startswith("Mitigation: "):
            mitigations.append(f"{path.name} ({state.removeprefix('Mitigation: ').split(';')[0]})")
    return {
        "cpu": model[1] if model else os.uname().machine,
        "cpus": os.cpu_count() or 1,
        "kernel": os.uname().release,
        "mitigations": mitigations,
    }


def sentence() -> str:
    """``machine()`` for people."""
    found = machine()
    listed = found["mitigations"]
    assert isinstance(listed, list)
    return (
        f"Measured on {found['cpus']} CPUs ({found['cpu']}), kernel {found['kernel']}, "
        f"mitigations in force: {', '.join(listed) or 'none'}."
    )
