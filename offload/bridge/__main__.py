"""``python -m offload.bridge SWITCH``, installed as ``offload-bridge``: a switch's Python bridge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from offload.bridge.supervisor import serve
from offload.errors import OffloadError
from offload.paths import Paths

_DESCRIPTION = """\
Switches the default path of one switch with `bridge: python`. The controller says in
RUN_DIR/bridges/SWITCH.json who is in it; what became of the frames is written to
RUN_DIR/bridges/SWITCH.stats.json every second. Frames flow without the controller, too.

Started by the unit offload-bridge@SWITCH.service. Needs CAP_NET_RAW.
"""
_EPILOG = """\
Exit codes:
  0  ended by a signal
  1  failed
  2  bad usage, or a membership file that is wrong at the start
  3  this kernel cannot
  4  a privilege is missing
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it; ends the process with the exit code of the contract."""
    parser = argparse.ArgumentParser(
        "offload-bridge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("switch", metavar="SWITCH", help="name of the switch")
    parser.add_argument(
        "--run-dir", type=Path, default=Paths().run_dir, help="where `bridges` is (default: %(default)s)"
    )
    parser.add_argument(
        "--ring",
        type=_mebibytes,
        default=64,
        metavar="MIB",
        help="memory for frames that wait, 15 in a MiB (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    try:
        sys.exit(serve(chosen.run_dir, chosen.switch, chosen.ring))
    except OffloadError as error:
        print(f"offload-bridge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _mebibytes(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError("must be from 1 to 4096")
    return value


if __name__ == "__main__":
    main()
