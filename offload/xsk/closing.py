"""What has to be closed, as a context manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that is closed on leaving. ``close`` may be called any number of times."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held. The subclass says what stays behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
