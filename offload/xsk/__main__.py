"""``python -m offload.xsk``: see, count, answer and forward what comes to an AF_XDP socket."""

from __future__ import annotations

import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click

from . import tools
from .bound import BusyPoll
from .errors import PrivilegeError, UnsupportedError, XskError
from .pcap import Writer
from .socket import Socket
from .sources import HandedOver, Queue, Source, Wanted
from .tools import Run, Summary
from .umem import UmemShape

_EPILOG = """\b
Exit codes:
  0  done, also when ended by SIGINT or SIGTERM
  1  failed
  2  bad usage
  3  this kernel or driver cannot
  4  a privilege is missing
"""
_SOURCES = """Frames reach the socket in one of three ways. With --mode a small XDP program is attached to
DEVICE that hands it the frames of its queue and passes all others on; it goes when the tool
ends, and a program that is there already is never replaced. With --map and --index the socket is put
into a pinned XSKMAP of a program that somebody else attached. With --socket somebody else makes the
socket, as offload does for its AF_XDP ports.

Needs CAP_NET_RAW, and CAP_BPF and CAP_NET_ADMIN for a program or a map; nothing with --socket."""


class _Command(click.Command):
    """A command whose help says where sockets come from, and the exit codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["help"] = f"{inspect.cleandoc(kwargs['help'])}\n\n{_SOURCES}"
        super().__init__(*args, **({"epilog": _EPILOG} | kwargs))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Use AF_XDP sockets from the command line.

    An AF_XDP socket takes the frames of one queue of a network device before the network stack
    sees them, in memory that the kernel and the program share. Every tool runs until SIGINT or SIGTERM,
    --count or --seconds.

    \b
    Examples:
      python -m offload.xsk dump -d eth1 --mode native --count 10
      python -m offload.xsk dump -d eth1 -q 2 --mode native --write - | tcpdump -nr -
      python -m offload.xsk drop -d eth1 --map /sys/fs/bpf/xsks --index 0 --seconds 10 --json
      python -m offload.xsk forward -d eth1 --mode native --to eth2
      python -m offload.xsk dump --socket /run/offload/xsk/db1.sock
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """What every tool has."""
    options = (
        click.option("--device", "-d", help="Network device, in this network namespace."),
        click.option("--queue", "-q", type=click.IntRange(0), default=0, show_default="0", help="RX queue."),
        click.option(
            "--mode",
            type=click.Choice(["native", "generic"]),
            help="Attach a program: native in the driver, generic on any device and slower.",
        ),
        click.option(
            "--map",
            "map_path",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Use this pinned XSKMAP instead of attaching a program.",
        ),
        click.option(
            "--socket",
            "hand_over",
            type=click.Path(path_type=Path, readable=False),
            metavar="PATH",
            help="Have a socket handed over at this unix socket; --device and --queue choose which, and "
            "of the settings only --frames counts.",
        ),
        click.option(
            "--index", type=click.IntRange(0), metavar="N", help="Entry of --map.  [default: the queue]"
        ),
        click.option(
            "--copy/--zero-copy",
            "copy",
            default=None,
            help="Have the kernel copy frames, or insist that the NIC places them.  "
            "[default: what the driver can]",
        ),
        click.option(
            "--spin",
            type=click.IntRange(0, 1000000),
            default=100,
            show_default="100",
            metavar="MICROSECONDS",
            help="Look for frames this long before sleeping.",
        ),
        click.option("--busy-poll", is_flag=True, help="Poll the NIC instead of sleeping."),
        click.option("--multi-buffer", is_flag=True, help="Take frames longer than a chunk (Linux 6.6)."),
        click.option(
            "--frames",
            type=click.IntRange(64, 1 << 20),
            default=4096,
            show_default=True,
            help="Chunks of memory for frames.",
        ),
        click.option(
            "--chunk",
            type=click.Choice(["2048", "4096"]),
            default="2048",
            show_default=True,
            help="Bytes of each; 256 are the kernel's.",
        ),
        click.option("--huge-pages", is_flag=True, help="Take the memory from huge pages."),
        click.option(
            "--batch",
            type=click.IntRange(1, 4096),
            default=256,
            show_default=True,
            help="Frames at a time.",
        ),
        click.option("--count", type=click.IntRange(1), help="End after so many frames."),
        click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after this time."),
        click.option("--json", "as_json", is_flag=True, help="Summary as JSON on standard output."),
    )
    command = _ending_well(command)
    for option in reversed(options):
        command = option(command)
    return command


def _ending_well(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become messages and exit codes."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except (XskError, ValueError) as error:
            _fail(error)

    return run


def _fail(error: Exception) -> NoReturn:
    print(f"offload.xsk: {error}", file=sys.stderr)
    match error:
        case ValueError():
            code = 2
        case UnsupportedError():
            code = 3
        case PrivilegeError():
            code = 4
        case _:
            code = 1
    sys.exit(code)


def _opened(options: Mapping[str, Any], held: ExitStack, *, sends: bool = False) -> Socket:
    socket = _source(options).open(_wanted(options, sends=sends), held)
    socket.spin = options["spin"] / 1e6
    return socket


def _source(options: Mapping[str, Any]) -> Source:
    """The one source that the options name."""
    mode, path, index, queue = (options[key] for key in ("mode", "map_path", "index", "queue"))
    if sum(options[key] is not None for key in ("mode", "map_path", "hand_over")) != 1:
        raise click.UsageError("Say how frames reach the socket: by --mode, --map or --socket, one of them.")
    if options["hand_over"] is not None:
        return HandedOver(options["hand_over"], options["device"], queue)
    if options["device"] is None:
        raise click.UsageError("Missing option '--device' / '-d'.")
    if path is None and index is not None:
        raise click.UsageError("--index is an entry of --map, which is missing.")
    pinned = None if path is None else (path, queue if index is None else index)
    return Queue(options["device"], queue, mode, pinned)


def _wanted(options: Mapping[str, Any], *, receives: bool = True, sends: bool = False) -> Wanted:
    settings = {
        "copy": {None: "auto", True: "copy", False: "zero-copy"}[options["copy"]],
        "multi_buffer": options["multi_buffer"],
        "busy_poll": BusyPoll(budget=options["batch"]) if options["busy_poll"] else None,
    }
    shape = UmemShape(options["frames"], int(options["chunk"]))
    return Wanted(shape, options["huge_pages"], receives, sends, settings)


def _run(options: Mapping[str, Any]) -> Run:
    """The run, from now on; signals end it."""
    run = Run(options["count"], options["seconds"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: run.stop())
    print("offload.xsk: ready", file=sys.stderr, flush=True)
    return run


def _report(summary: Summary, options: Mapping[str, Any]) -> None:
    if options["as_json"]:
        print(json.dumps(summary.document()))
        return
    sent = "" if summary.sent is None else f", {summary.sent} sent"
    moved = "zero copy" if summary.zero_copy else "copy"
    losses = ", ".join(f"{name} {count}" for name, count in summary.lost.items() if count)
    print(
        f"{summary.frames} frames{sent} in {summary.seconds:.2f} s, {summary.rate:.0f} frames/s, {moved}; "
        f"lost: {losses or 'none'}",
        file=sys.stderr,
    )


@main.command(cls=_Command)
@_options
def drop(**options: Any) -> None:
    """Count the frames of a queue, and drop them."""
    with ExitStack() as held:
        socket = _opened(options, held)
        _report(tools.drop(socket, _run(options), options["batch"]), options)


@main.command(cls=_Command)
@click.option(
    "--write", "-w", type=click.File("wb"), metavar="FILE", help="Write pcap to FILE, - for stdout."
)
@click.option("--hex", "with_bytes", is_flag=True, help="Show every frame's bytes, too.")
@_options
def dump(write: BinaryIO | None, with_bytes: bool, **options: Any) -> None:
    """Show the frames of a queue, one a line, or write them to a file.

    A line has the time, source and destination MAC, EtherType, and length. Frames that are shown are
    not delivered to anybody else.
    """
    writer = None if write is None else Writer(write)
    quiet = options["as_json"]

    def show(time_ns: int, frame: memoryview) -> None:
        if writer is not None:
            writer.write(time_ns, frame)
        elif not quiet:
            print(_line(time_ns, frame, with_bytes))

    with ExitStack() as held:
        socket = _opened(options, held)
        _report(tools.dump(socket, _run(options), options["batch"], show), options)


@main.command(cls=_Command)
@_options
def echo(**options: Any) -> None:
    """Send the frames of a queue back out of the device, with source and destination MAC swapped."""
    with ExitStack() as held:
        socket = _opened(options, held, sends=True)
        _report(tools.echo(socket, _run(options), options["batch"]), options)


@main.command(cls=_Command)
@click.option("--to", "target", required=True, metavar="DEVICE", help="Device to send out of.")
@click.option("--to-queue", type=click.IntRange(0), default=0, show_default=True, help="TX queue of it.")
@_options
def forward(target: str, to_queue: int, **options: Any) -> None:
    """Send the frames of a queue out of another device, unchanged. One way: run two for both.

    Both devices use the same memory, so that frames are not copied between them.
    """
    with ExitStack() as held:
        source = _opened(options, held)
        # The one that sends takes everything over from the one that registered the memory.
        wanted = _wanted(options, receives=False, sends=True)
        sink = Queue(target, to_queue).open(wanted, held, partner=source)
        _report(tools.forward(source, sink, _run(options), options["batch"]), options)


def _line(time_ns: int, frame: memoryview, with_bytes: bool) -> str:
    seconds, nanoseconds = divmod(time_ns, 10**9)
    when = f"{datetime.fromtimestamp(seconds):%H:%M:%S}.{nanoseconds // 1000:06d}"
    destination, source = (bytes(frame[at : at + 6]).hex(":") for at in (0, 6))
    line = f"{when} {source} > {destination} 0x{bytes(frame[12:14]).hex()} {len(frame)}"
    return f"{line} {bytes(frame).hex()}" if with_bytes else line


if __name__ == "__main__":
    main(prog_name="python -m offload.xsk")
