"""Several checks whose findings are told at once."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
FAILURES = (ValueError, OSError, RuntimeError, ArithmeticError, TypeError, IndexError, KeyError)


class Faults:
    """Runs checks, and says at once what all of them found."""

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """What `check` returns, or None where it failed."""
        try:
            return check()
        except FAILURES as error:
            self.found.append(error)
            return None

    def tell(self) -> None:
        """Raise what one check found as it is, and of several one ValueError with all."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = "".join(f"\n  {i}. {error}" for i, error in enumerate(self.found, 1))
            raise ValueError(f"{len(self.found)} things to put right before it can start:{lines}")
