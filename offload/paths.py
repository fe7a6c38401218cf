"""Where an instance of offload keeps its files.

Several instances live side by side when each has its own three directories.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The three directories of an instance, and what lies in them.

    ``run_dir`` lasts until reboot, ``state_dir`` survives it, and ``pin_dir`` is on a
    BPF file system, where kernel objects outlive the processes that made them.
    """

    run_dir: Path = Path("/run/offload")
    state_dir: Path = Path("/var/lib/offload")
    pin_dir: Path = Path("/sys/fs/bpf/offload")

    @property
    def socket(self) -> Path:
        """The API's unix socket."""
        return self.run_dir / "api.sock"

    @property
    def journal(self) -> Path:
        """What settings of other people were before they were changed."""
        return self.run_dir / "journal.jsonl"

    @property
    def hurrying(self) -> Path:
        """Is there while grace periods are expedited (``kernel.rcu``)."""
        return self.run_dir / "rcu-expedited"

    @property
    def pending(self) -> Path:
        """A takeover that waits for its confirmation."""
        return self.run_dir / "takeover.json"

    @property
    def takeovers(self) -> Path:
        """Takeovers that were confirmed."""
        return self.state_dir / "takeovers.json"

    @property
    def run_ports(self) -> Path:
        """Port files that last until reboot."""
        return self.run_dir / "ports.d"

    @property
    def state_ports(self) -> Path:
        """Port files that survive a reboot (``port add --keep``)."""
        return self.state_dir / "ports.d"

    @property
    def bridges(self) -> Path:
        """What the Python bridges are told, and what they tell."""
        return self.run_dir / "bridges"

    def bridge_lock(self, switch: str) -> Path:
        """Held by the process of a switch's Python bridge."""
        return self.bridges / f"{switch}.lock"

    def namespace(self, port: str) -> Path:
        """The network namespace of an AF_XDP port's inner end."""
        return self.run_dir / "netns" / port

    def hand_over(self, port: str) -> Path:
        """The unix socket at which an AF_XDP port's consumer gets maps and sockets."""
        return self.run_dir / "xsk" / f"{port}.sock"

    @property
    def cache(self) -> Path:
        """Compiled programs."""
        return self.state_dir / "cache"

    @property
    def objects(self) -> Path:
        """Pinned programs, maps and links. The name changes when their layout does."""
        return self.pin_dir / "v4"
