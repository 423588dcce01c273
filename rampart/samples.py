"""Traffic signs drawn by Pillow, to try a model on, and photographs of none: without a download.

Shapes and colours are those of the Vienna Convention on Road Signs (1968), as Germany has them.
They stand before a blurred background, seen from the side, in changing light.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIDE, FINE = 96, 4  # pixels a side of a picture, and how much finer it is drawn
DIGIT = 0.66  # height of a digit, of half the picture
RED, BLUE, WHITE, BLACK, YELLOW = "#b5121b", "#0b4da2", "#f4f4f2", "#171717", "#f3b61f"
Point = tuple[float, float]
Stroke = list[Point]


def arc(middle: Point, across: float, down: float, start: float, end: float) -> Stroke:
    """A part of an ellipse, clockwise from `start` to `end` degrees; 0 is to the right."""
    angles = np.radians(np.linspace(start, end, 24))
    x, y = middle
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]


# Digits as strokes in a box of one by one, y downwards, as open as on road signs (DIN 1451).
DIGITS: dict[str, list[Stroke]] = {
    "0": [
        [
            *arc((0.5, 0.32), 0.38, 0.32, 180, 360),
            *arc((0.5, 0.68), 0.38, 0.32, 0, 180),
            (0.12, 0.3),
        ]
    ],
    "1": [[(0.2, 0.26), (0.58, 0), (0.58, 1)]],
    "2": [[*arc((0.5, 0.28), 0.36, 0.28, 180, 385), (0.12, 1), (0.9, 1)]],
    "3": [[*arc((0.48, 0.25), 0.34, 0.25, 190, 440), *arc((0.48, 0.73), 0.38, 0.27, 280, 530)]],
    "5": [[(0.84, 0), (0.22, 0), (0.17, 0.46), *arc((0.48, 0.68), 0.38, 0.32, 215, 510)]],
    "6": [[(0.66, 0), (0.2, 0.52)], arc((0.5, 0.68), 0.38, 0.32, 0, 360)],
    "7": [[(0.1, 0), (0.9, 0), (0.4, 1)]],
    "8": [arc((0.5, 0.25), 0.33, 0.25, 0, 360), arc((0.5, 0.74), 0.39, 0.26, 0, 360)],
}


class Board:
    """What a sign is drawn on: coordinates from -1 to 1, y downwards, on a transparent ground."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (SIDE * FINE,) * 2)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, x: float, y: float) -> Point:
        """Where (x, y) is in pixels."""
        half = SIDE * FINE / 2
        return half + x * half, half + y * half

    def disc(self, radius: float, colour: str) -> None:
        """A disc around the middle."""
        self.draw.ellipse((*self.at(-radius, -radius), *self.at(radius, radius)), fill=colour)

    def polygon(self, points: list[Point], colour: str) -> None:
        """A filled polygon."""
        self.draw.polygon([self.at(*point) for point in points], fill=colour)

    def corners(self, count: int, radius: float, turn: float, colour: str, y: float = 0) -> None:
        """A regular polygon around (0, y), its first corner `turn` degrees from the top."""
        angles = [math.radians(turn + 360 * i / count - 90) for i in range(count)]
        points = [(radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        self.polygon(points, colour)

    def text(self, words: str, height: float, colour: str, width: float = 1.0) -> None:
        """Words around the middle; `width` squeezes them."""
        font = ImageFont.load_default(height * SIDE * FINE / 2)
        left, top, right, bottom = font.getbbox(words, stroke_width=FINE)
        layer = Image.new("RGBA", (round(right - left), round(bottom - top)))
        pen = ImageDraw.Draw(layer)
        pen.text((-left, -top), words, colour, font, stroke_width=FINE, stroke_fill=colour)
        layer = layer.resize((max(1, round(layer.width * width)), layer.height))
        x, y = self.at(0, 0)
        self.image.alpha_composite(layer, (round(x - layer.width / 2), round(y - layer.height / 2)))

    def digits(self, number: int, width: float) -> None:
        """A number around the middle, each digit so wide and DIGIT high."""
        text = str(number)
        thick = 0.14 if len(text) < 3 else 0.11
        step = width + 0.11 + (0.05 if len(text) < 3 else 0)
        for i, digit in enumerate(text):
            left = (i - (len(text) - 1) / 2) * step - width / 2
            for stroke in DIGITS[digit]:
                points = [self.at(left + x * width, (y - 0.5) * DIGIT) for x, y in stroke]
                line = round(thick * SIDE * FINE / 2)
                self.draw.line(points, BLACK, line, joint="curve")
                for x, y in (points[0], points[-1]):
                    r = line / 2
                    self.draw.ellipse((x - r, y - r, x + r, y + r), fill=BLACK)

    def arrow(self, turn: float, colour: str) -> None:
        """An arrow through the middle, up at 0 degrees, to the right at 90."""
        shape = [
            (-0.13, 0.6),
            (0.13, 0.6),
            (0.13, -0.1),
            (0.42, -0.1),
            (0, -0.62),
            (-0.42, -0.1),
            (-0.13, -0.1),
        ]
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        self.polygon([(x * c - y * s, x * s + y * c) for x, y in shape], colour)


def stop(board: Board) -> None:
    """A red octagon that says STOP."""
    board.corners(8, 0.97, 22.5, WHITE)
    board.corners(8, 0.91, 22.5, RED)
    board.text("STOP", 0.78, WHITE, 0.8)


def give_way(board: Board) -> None:
    """A triangle on its tip, red around white."""
    board.corners(3, 1.05, 180, RED, -0.25)
    board.corners(3, 0.68, 180, WHITE, -0.25)


def no_entry(board: Board) -> None:
    """A red disc with a white bar."""
    board.disc(0.95, WHITE)
    board.disc(0.9, RED)
    board.polygon([(-0.68, -0.17), (0.68, -0.17), (0.68, 0.17), (-0.68, 0.17)], WHITE)


def limit(speed: int) -> Callable[[Board], None]:
    """A red ring around the speed."""

    def sign(board: Board) -> None:
        board.disc(0.95, RED)
        board.disc(0.72, WHITE)
        board.digits(speed, 0.24 if speed > 99 else 0.36)

    return sign


def no_vehicles(board: Board) -> None:
    """A red ring around white."""
    board.disc(0.95, RED)
    board.disc(0.72, WHITE)


def priority_road(board: Board) -> None:
    """A yellow diamond in a white one."""
    board.corners(4, 1.0, 0, BLACK)
    board.corners(4, 0.97, 0, WHITE)
    board.corners(4, 0.68, 0, YELLOW)


def danger(board: Board) -> None:
    """A triangle, red around white, with an exclamation mark."""
    board.corners(3, 1.05, 0, RED, 0.25)
    board.corners(3, 0.68, 0, WHITE, 0.25)
    board.polygon([(-0.1, -0.22), (0.1, -0.22), (0.05, 0.26), (-0.05, 0.26)], BLACK)
    board.draw.ellipse((*board.at(-0.09, 0.33), *board.at(0.09, 0.51)), fill=BLACK)


def way(turn: float) -> Callable[[Board], None]:
    """A white arrow on a blue disc."""

    def sign(board: Board) -> None:
        board.disc(0.95, WHITE)
        board.disc(0.91, BLUE)
        board.arrow(turn, WHITE)

    return sign


# By the names of the classes that the shipped model for traffic signs has.
SIGNS: dict[str, Callable[[Board], None]] = {
    "stop": stop,
    "yield": give_way,
    "no entry": no_entry,
    **{f"speed limit {speed}": limit(speed) for speed in (20, 30, 50, 60, 70, 80, 100, 120)},
    "no vehicles": no_vehicles,
    "priority road": priority_road,
    "danger": danger,
    "ahead only": way(0),
    "keep right": way(135),
}


# Photographs that show no sign, and are free of rights: see photographs.txt beside them.
DATA = Path(__file__).parent / "data"
PHOTOGRAPHS = {name: DATA / f"{name}.jpg" for name in ("cat", "rocket", "coffee")}


def background(draws: np.random.Generator) -> Image.Image:
    """Sky above green or gray, out of focus."""
    sky = draws.uniform(90, 200) + np.array((0, 10, draws.uniform(10, 45)))
    ground = draws.uniform(30, 110) + np.array((draws.uniform(0, 25), draws.uniform(0, 35), 0))
    rows = np.linspace(0, 1, SIDE)[:, None, None] > draws.uniform(0.3, 0.8)
    pixels = np.where(rows, ground, sky) + draws.normal(0, 60, (SIDE, SIDE, 1))
    image = Image.fromarray(np.broadcast_to(pixels, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(draws.uniform(2, 6)))


def seen(board: Board, draws: np.random.Generator) -> Image.Image:
    """The sign from a little to the side, at a distance, (SIDE, SIDE) with transparency."""
    fine, reach = SIDE * FINE, draws.uniform(0.66, 0.86)
    middle = fine / 2 + draws.uniform(-0.06, 0.06, 2) * fine
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * reach * fine / 2
    corners = (
        corners * draws.uniform((0.8, 0.95), (1, 1)) + draws.uniform(-0.03, 0.03, (4, 2)) * fine
    )
    target = corners + middle
    source = np.array([(0, 0), (fine, 0), (fine, fine), (0, fine)], float)
    rows = [
        row
        for (x, y), (u, v) in zip(target, source, strict=True)
        for row in ((x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y))
    ]
    mapping = np.linalg.solve(np.array(rows), source.flatten()).tolist()
    return board.image.transform(
        (fine, fine), Image.Transform.PERSPECTIVE, mapping, Image.Resampling.BICUBIC
    ).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def sample(name: str, seed: int = 0) -> Image.Image:
    """The sign of this name as a picture (SIDE, SIDE), another one for each seed. KeyError for a
    name that SIGNS lacks.
    """
    draws = np.random.default_rng([seed, *name.encode()])
    board = Board()
    SIGNS[name](board)
    picture = background(draws).convert("RGBA")
    picture.alpha_composite(seen(board, draws))
    out = picture.convert("RGB").filter(ImageFilter.GaussianBlur(draws.uniform(0, 1.2)))
    out = ImageEnhance.Brightness(out).enhance(draws.uniform(0.6, 1.15))
    return ImageEnhance.Contrast(out).enhance(draws.uniform(0.75, 1.1))


def write(folder: Path, *, count: int = 1, seed: int = 0) -> list[Path]:
    """Draw signs into `folder`, as `draw` does, beside photographs that show none; the files."""
    files = draw(folder, count=count, seed=seed)
    for photograph in PHOTOGRAPHS.values():
        files.append(folder / photograph.name)
        shutil.copyfile(photograph, files[-1])
    return files


def draw(folder: Path, *, count: int = 1, seed: int = 0) -> list[Path]:
    """Draw `count` pictures of each sign into `folder` as NAME-NUMBER.png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in SIGNS:
        for number in range(seed, seed + count):
            files.append(folder / f"{name.replace(' ', '-')}-{number}.png")
            sample(name, number).save(files[-1])
    return files
