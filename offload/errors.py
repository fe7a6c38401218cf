"""The errors that reach a person, named for who has to act.

Every error carries the exit code of CONTRACT.md, so that the command line and
the API agree on what went wrong without a table between them.
"""

from __future__ import annotations

from dataclasses import dataclass


class OffloadError(Exception):
    """Something failed; ``exit_code`` tells which kind of failure it was."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config.

    ``path`` is dotted (``ports.web1.vlan``), ``value`` is what was found there
    in the words of the file, ``allowed`` says what would be accepted.
    """

    path: str
    value: str
    allowed: str

    def __str__(self) -> str:
        shown = f" {self.value}:" if self.value else ""
        return f"{self.path}:{shown} {self.allowed}"


class ConfigError(OffloadError):
    """The operator's input is wrong. Holds every problem, not just the first."""

    exit_code = 2

    def __init__(self, problems: list[Problem], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class UsageError(OffloadError):
    """The command cannot mean anything as it was given."""

    exit_code = 2


class UnsupportedError(OffloadError):
    """This kernel, driver or version of offload cannot do what is asked."""

    exit_code = 3


class PrivilegeError(OffloadError):
    """The process lacks a privilege; the message names it and what it is for."""

    exit_code = 4


class KernelError(OffloadError):
    """The kernel refused or failed an operation that should have worked."""


class ForeignError(OffloadError):
    """Something that is not ours stands in the way; it is never replaced."""


class VerifyError(OffloadError):
    """The kernel's state after a change is not the state that was asked for."""
