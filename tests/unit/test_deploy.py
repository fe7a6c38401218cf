"""What is shipped beside the code: packaging, shell scripts, the service unit, alert rules."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "deploy").glob("*.sh"), ROOT / ".ci/run"])


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_bcc_is_never_taken_from_pypi(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    wanted = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}  # type: ignore[index]
    assert "pyroute2" in names
    assert "bcc" not in names


def test_an_installed_package_carries_the_bpf_sources(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"bpf": "offload/bpf"}
    assert list((ROOT / "bpf").glob("*.c"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_executable_strict_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert "\nset -euo pipefail\n" in script.read_text()


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    unit = tmp_path / "offload.service"
    text = (ROOT / "deploy/systemd/offload.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/offload", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert "offload.service" not in verified.stderr


def test_alerts_use_metrics_that_exist() -> None:
    # offload_config_load_error stands for itself; a counter is declared without its suffix.
    declared = set(re.findall(r'"(offload_\w+)"', (ROOT / "offload/metrics.py").read_text()))
    rules = (ROOT / "deploy/prometheus/offload.rules.yml").read_text()
    used = {
        name.removesuffix("_total")
        for line in rules.splitlines()
        if "expr:" in line
        for name in re.findall(r"\boffload_\w+", line)
    }
    assert len(used) > 4
    assert used <= declared
