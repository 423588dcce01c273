"""What a data set holds, in words: printed before anything is trained on it."""

from collections.abc import Sequence
from typing import NamedTuple

NAMED = 12  # classes that are told one by one
IMBALANCE = 20  # times that the largest class may have the smallest, without a word
Size = tuple[int, int]  # width and height


class Survey(NamedTuple):
    """Images a class, sizes as stored, what was left out and why."""

    name: str
    counts: dict[str, int]
    sizes: Sequence[Size] = ()
    left_out: Sequence[str] = ()

    def lines(self, size: int) -> list[str]:
        """The summary for a model of `size` pixels a side, with what looks wrong."""
        total, classes = sum(self.counts.values()), len(self.counts)
        first = (
            f"{self.name}: {total:,} images, {classes:,} {'classes' if classes > 1 else 'class'}"
        )
        if self.sizes:
            first += f", {in_words(self.sizes)}"
        lines = [first, f"  {self.classes()}"]
        if self.left_out:
            lines.append(f"  left out: {'; '.join(self.left_out)}")
        return [*lines, *(f"  warning: {doubt}" for doubt in self.doubts(size))]

    def classes(self) -> str:
        """Images of each class; of many classes the smallest and the largest ones."""
        ranked = sorted(self.counts.items(), key=lambda entry: entry[1])
        if len(ranked) <= NAMED:
            return ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        few, many = (
            ", ".join(f"{name} {count:,}" for name, count in part)
            for part in (ranked[:3], ranked[-3:])
        )
        return f"fewest: {few}; most: {many}"

    def doubts(self, size: int) -> list[str]:
        """What is plausible of no set of images that one would train on."""
        doubts = []
        most, least = max(self.counts.values()), min(self.counts.values())
        if most > IMBALANCE * max(1, least):
            rare = min(self.counts, key=lambda name: self.counts[name])
            doubts.append(f"class {rare} has {least} images, but the largest has {most:,}")
        small = sum(min(sides) < size for sides in self.sizes)
        if small * 2 > len(self.sizes):
            doubts.append(
                f"{small:,} pictures are smaller than the model's {size} pixels per side, and are"
                " enlarged: choose a smaller --image-size to avoid that"
            )
        return doubts


def in_words(sizes: Sequence[Size]) -> str:
    """From the smallest to the largest picture."""
    ranked = sorted(sizes, key=lambda sides: sides[0] * sides[1])
    small, large = (f"{width}x{height}" for width, height in (ranked[0], ranked[-1]))
    return f"{small} pixels" if small == large else f"{small} to {large} pixels"
