"""Boot a machine and run a command in it: ``python -m tests.vm KERNEL [--tree DIR] -- COMMAND ...``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from tests.vm.archive import ROOT
from tests.vm.kernels import KERNELS
from tests.vm.machine import Machine
from tests.vm.nics import NICS


def end(number: int, frame: object) -> NoReturn:
    """Leave by way of what is to be removed, once."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the working tree to test (this one)")
    parser.add_argument(
        "--nic", action="append", default=[], choices=NICS, help="with two of these on a wire"
    )
    parser.add_argument("--log", type=Path, help="a file for the console")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()

    def show(stream: str, data: bytes) -> None:
        target = getattr(sys, stream).buffer
        target.write(data)
        target.flush()

    start = time.monotonic()
    signal.signal(signal.SIGTERM, end)
    nics = [NICS[name] for name in options.nic]
    with Machine(KERNELS[options.kernel], options.tree, options.log, nics) as machine:
        print(f"{machine}: up after {time.monotonic() - start:.1f} s", file=sys.stderr)
        start = time.monotonic()
        result = machine.run(*options.command, timeout=options.timeout, show=show)
        machine.keep_compiled()
    print(f"exit {result.exit_code} after {time.monotonic() - start:.1f} s", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
