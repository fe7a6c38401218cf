"""Nanoseconds per frame of the program alone, by BPF_PROG_TEST_RUN. Needs root.

Asserts what the programs decide, and nothing about time; the figures are printed, and recorded
as properties of the test. Every frame's destination is drawn by a feeding program, whose cost is
in every figure; what is over the program that passes everything is the program's own.
A redirect is decided on here and not carried out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest

from offload.kernel.bpf import Program
from offload.kernel.dataplane import MAX_PORTS
from tests.bench.generator import FIRST, Bare, Generator, offload_on
from tests.bench.machine import sentence
from tests.lab import Lab

PASS, REDIRECT = 2, 4  # enum xdp_action
ROUNDS, FRAMES = 25, 200_000
NOBODY, EVERYBODY = "02:15:5e:00:00:00", "ff:ff:ff:ff:ff:ff"


@dataclass(frozen=True)
class Case:
    """A program, which frames it gets, what it must say to them; and the time that it took, per round."""

    name: str
    program: Program
    verdict: int
    destinations: int = 1
    first: str = FIRST
    nanoseconds: list[int] = field(default_factory=list)


@pytest.mark.slow
def test_ns_per_frame(
    make_lab: Callable[..., Lab],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ExitStack() as held:
        generator = held.enter_context(Generator(tmp_path))
        bare = held.enter_context(Bare(tmp_path))
        lab = make_lab()
        bare.set_device("devices", 0, lab.host, lab.vm("web1", mac=FIRST).device)
        nothing = Case("pass everything", bare.programs["pass"], PASS)
        redirect = Case("bare redirect", bare.programs["redirect"], REDIRECT)
        few, many, full = (_ours(held, make_lab(), tmp_path, filters) for filters in (1, 4096, 65_536))
        cases = [
            nothing,
            redirect,
            Case("ours, 1 filter", few, REDIRECT),
            Case("ours, 4,096 filters", many, REDIRECT, 4096),
            Case("ours, 65,536 filters", full, REDIRECT, 65_536),
            Case("ours, 65,536 filters, a miss", full, PASS, 65_536, NOBODY),
            Case("ours, 65,536 filters, broadcast", full, PASS, 1, EVERYBODY),
        ]
        for _ in range(ROUNDS):
            for case in cases:
                verdict, nanoseconds = generator.nanoseconds(
                    case.program, FRAMES, case.destinations, case.first
                )
                assert verdict == case.verdict, case.name
                case.nanoseconds.append(nanoseconds)

    floor, limit = median(nothing.nanoseconds), median(redirect.nanoseconds)
    with capsys.disabled():
        print(f"\n{sentence()}\n\n{'':32}  ns/frame  over pass  to bare redirect")
        for case in cases:
            taken = median(case.nanoseconds)
            record_property(case.name, taken)
            print(f"{case.name:32}  {taken:8.0f}  {taken - floor:9.0f}  {taken / limit:16.2f}")


def _ours(held: ExitStack, lab: Lab, cache: Path, filters: int) -> Program:
    """Our program on a NIC of its own, its filters dealt out to as many ports as there can be."""
    device = lab.vm("web1", mac=FIRST).device
    dataplane = offload_on(held, cache, lab, device, filters, min(filters, MAX_PORTS))
    return dataplane.nic(lab.host.ifindex(lab.nic)).programs["uplink"]
