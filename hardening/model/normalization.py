"""Mean and std of training pixels, and whether they can be those of pixels in [0, 1]."""

import math
from typing import NamedTuple

Colour = tuple[float, float, float]  # red, green, blue
LARGEST_STD = 2.0  # of pixels in [0, 1]; 1 leaves them as they are
LEVELS = 255


class Normalization(NamedTuple):
    """What is subtracted from pixels in [0, 1], and what they are then divided by."""

    mean: Colour
    std: Colour

    def fault(self) -> str:
        """What is wrong with it, "" where nothing is."""
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            return "is not finite"
        if min(self.std) <= 0:
            return "divides by a std of 0 or less"
        if self.is_of_levels():
            return f"is of pixels from 0 to {LEVELS}"
        if min(self.mean) < 0:
            return "has a mean below 0"
        return ""

    def is_of_levels(self) -> bool:
        """Whether it is of pixels from 0 to 255."""
        return max(self.mean) > 1 or max(self.std) > LARGEST_STD

    def divided(self) -> "Normalization":
        """The same one of pixels in [0, 1], where it was of pixels from 0 to 255."""
        mean, std = (tuple(round(value / LEVELS, 6) for value in part) for part in self)
        return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))

    def check(self, name: str) -> None:
        """Raise ValueError, with the remedy, where it is none of pixels in [0, 1]."""
        fault = self.fault()
        if not fault:
            return
        remedy = "pass the mean and std of the training pixels in [0, 1]"
        if self.is_of_levels() and not self.divided().fault():
            mean, std = self.divided()
            remedy = f"pass them divided by {LEVELS}, mean {mean} and std {std}"
        raise ValueError(f"{name}, mean {self.mean} and std {self.std}, {fault}: {remedy}")
