"""A clock of the test's own, in place of a module's `time`."""


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now
