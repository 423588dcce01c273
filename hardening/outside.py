"""Outside the main threat model, and reported as such: L2, a patch, corruptions, the resize step.

    rampart outside model_store/NAME --data images.npz

Nothing here was trained or calibrated for; the figures say what to expect, not what is promised.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.data import data_dir
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as change

from handlers.image import decode
from hardening import cache, report, rungs
from hardening.alarms import PHOTOGRAPHS, saved
from hardening.attacks import Threat, pgd
from hardening.data import Images, to_float, to_uint8
from hardening.evaluate import attack_source
from hardening.metrics import Bools
from hardening.noise import Noise
from hardening.objectives import Look, as_loss, mislead, untargeted
from hardening.rungs import Budget
from hardening.victims import Victim

L2 = Threat("L2", 0.5)
# A sticker: its share of the side, tried at several places of the attacker's choosing.
STICKER, PLACES, STEPS = 3 / 16, 4, 40

Corrupt = Callable[[Tensor, Noise], Tensor]  # x (N, 3, H, W) in [0, 1], the same after


def impulses(x: Tensor, noise: Noise) -> Tensor:
    """One pixel in twenty black or white."""
    hit, white = noise.uniform(1, *x.shape[2:]) < 0.05, noise.uniform(1, *x.shape[2:]) < 0.5
    return torch.where(hit, white.to(x), x)


def pixelated(x: Tensor, noise: Noise) -> Tensor:
    """At half the resolution."""
    return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:])


def compressed(x: Tensor, noise: Noise) -> Tensor:
    """JPEG at quality 25."""
    pixels = to_uint8(x).permute(0, 3, 1, 2).cpu()
    return torch.stack([change.jpeg(one, 25) for one in pixels]).to(x.device).float() / 255


# The families of Hendrycks and Dietterich (2019, section 3) at one middle strength each, by
# torchvision: not CIFAR-10-C, and not to be compared with its figures.
CORRUPTIONS: dict[str, Corrupt] = {
    "Gaussian noise": lambda x, noise: x + 0.06 * noise.normal(*x.shape[1:]),
    "shot noise": lambda x, noise: x + 0.1 * x.sqrt() * noise.normal(*x.shape[1:]),
    "impulse noise": impulses,
    "defocus blur": lambda x, noise: change.gaussian_blur(x, [5, 5], [1.0, 1.0]),
    "motion blur": lambda x, noise: F.avg_pool2d(F.pad(x, (2, 2, 0, 0), "replicate"), (1, 5), 1),
    "fog": lambda x, noise: 0.6 * x + 0.4,
    "brightness": lambda x, noise: change.adjust_brightness(x, 1.5),
    "darkness": lambda x, noise: change.adjust_brightness(x, 0.5),
    "contrast": lambda x, noise: change.adjust_contrast(x, 0.4),
    "saturation": lambda x, noise: change.adjust_saturation(x, 2.5),
    "pixelate": pixelated,
    "JPEG, quality 25": compressed,
}


def patch(look: Look, x: Tensor, label: Tensor, *, share: float = STICKER) -> Tensor:
    """A square of any colours, where it hurts most of PLACES tries; x (N, 3, H, W) with it on.

    The strength is bounded by area alone (Brown et al. 2017), and the rest of x stays as it is.
    """
    objective = mislead(look, untargeted(label), label)
    rank = as_loss(objective, len(x))
    best, best_rank = x, torch.full((len(x),), -torch.inf, device=x.device)
    for place in range(PLACES):
        noise = Noise(torch.arange(len(x), device=x.device), seed=place)
        mask = squares(x, noise, share)

        def stuck(z: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask, z, x)

        free = Threat("Linf", 1.0)  # within the square, any colour
        start = noise.uniform(*x.shape[1:]) - x
        z = pgd(lambda z: rank(stuck(z)), x, free, steps=STEPS, step_size=0.1, start=start)
        with torch.no_grad():
            value = rank(stuck(z))
        better = value > best_rank
        best = torch.where(better.view(-1, 1, 1, 1), stuck(z), best)
        best_rank = torch.where(better, value, best_rank)
    return best


def squares(x: Tensor, noise: Noise, share: float) -> Tensor:
    """A mask (N, 1, H, W) of one square an image, of this share of its height."""
    height, width = x.shape[2:]
    side = round(share * height)
    corner = noise.uniform(2)  # (N, 2)
    top = (corner[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
    left = (corner[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)


def attacks(victim: Victim, budget: Budget) -> dict[str, cache.Craft]:
    """The attacks on one victim, by what they may do."""
    l2 = partial(rungs.joint_apgd, victim.look, threat=L2, budget=budget)
    return {str(L2): l2, "patch": partial(patch, victim.look)}


def rows(
    victims: list[Victim], images: Images, budget: Budget, *, folder: Path
) -> Iterator[dict[str, Any]]:
    """Shares of `images` right, and right or rejected, in 8 bits, as the card lists them.

    What was found against any victim is put to all.
    """
    made: dict[str, list[Tensor]] = {str(L2): [], "patch": []}
    source = attack_source("outside")
    for victim in victims:
        for name, craft in attacks(victim, budget).items():
            key = f"{source} {victim.fingerprint} {name} {budget}"
            title = f"{victim.name}, {name}"
            made[name].append(cache.crafted(folder, key, images, craft, title=title))
    noise = Noise(torch.arange(len(images), device=images.image.device))
    for name, corrupt in CORRUPTIONS.items():
        made[name] = [corrupt(to_float(images.image), noise).clamp(0, 1)]
    for victim in victims:
        for name, found in made.items():
            right, safe = worst(victim, found, images)
            yield {
                "threat": name,
                "subject": victim.subject,
                "variant": victim.variant,
                "right": report.share(right),
                "right_or_rejected": report.share(safe),
                "n": len(images),
            }


def worst(victim: Victim, found: list[Tensor], images: Images) -> tuple[Bools, Bools]:
    """Which images (N,) are right, and which right or rejected, in all of `found`."""
    label = images.label.cpu().numpy()
    right, safe = np.ones(len(label), bool), np.ones(len(label), bool)
    for x in found:
        answer = victim.deployed(to_uint8(x))
        right &= answer.guess == label
        safe &= (answer.guess == label) | ~answer.accepted
    return right, safe


def scaling(size: int, *, times: int = 8) -> dict[str, Any]:
    """The image-scaling attack (Quiring et al. 2020, section 3) on the endpoint's resize step.

    A large photograph is changed as little as possible, so that the model sees another one. The
    figure is how much it had to change, as PSNR in dB: below 20 anybody sees it. Beside it what
    would do where pixels are picked (nearest neighbour), as many libraries do by default.
    """
    large = size * times
    pictures = [square(name, large) for name in PHOTOGRAPHS]
    ours: list[float] = []
    picked: list[float] = []
    off: list[float] = []
    for shown, hidden in zip(pictures, pictures[1:] + pictures[:1], strict=True):
        target = decode(saved(Image.fromarray(hidden)), size)
        for how, psnrs in ((Image.Resampling.BICUBIC, ours), (Image.Resampling.NEAREST, picked)):
            forged = forge(shown, target, how)
            psnrs.append(psnr(shown, forged))
            if how is Image.Resampling.BICUBIC:
                seen = decode(saved(Image.fromarray(forged)), size).astype(int)
                off.append(float(np.abs(seen - target).mean()))
    return {
        "pictures": len(pictures),
        "pixels": [large, size],
        "psnr": round(float(np.mean(ours)), 1),
        "psnr_nearest": round(float(np.mean(picked)), 1),
        "levels_off_target": round(float(np.mean(off)), 1),
    }


def square(name: str, side: int) -> NDArray[np.uint8]:
    """One of scikit-image's photographs as uint8 (side, side, 3)."""
    return decode((Path(data_dir) / name).read_bytes(), side)


def forge(
    shown: NDArray[np.uint8], target: NDArray[np.uint8], how: Image.Resampling
) -> NDArray[np.uint8]:
    """`shown` (S, S, 3) with the least change (in L2) that scales down to `target` (s, s, 3)."""
    eye = Image.fromarray(np.eye(len(shown), dtype=np.float32))
    rows = np.asarray(eye.resize((len(shown), len(target)), how), dtype=np.float64)  # (s, S)
    back = np.linalg.pinv(rows)  # (S, s)
    x = shown.astype(np.float64).transpose(2, 0, 1)
    lacking = target.transpose(2, 0, 1) - rows @ x @ rows.T
    forged = x + back @ lacking @ back.T
    return forged.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def psnr(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(one.astype(np.float64) - two).mean()
    return float(10 * np.log10(255**2 / error))


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, a column a victim."""
    who = list(dict.fromkeys((row["subject"], row["variant"]) for row in rows))
    head = ["threat", "images"]
    for subject, variant in who:
        name = subject if variant == "-" else variant
        head += [f"{name}: right"] + ([f"{name}: right or rejected"] if variant != "-" else [])
    body = []
    for threat in dict.fromkeys(row["threat"] for row in rows):
        mine = [row for row in rows if row["threat"] == threat]
        cells = [threat, str(mine[0]["n"])]
        for row in mine:
            cells.append(report.cell_text(row["right"]))
            if row["variant"] != "-":
                cells.append(report.cell_text(row["right_or_rejected"]))
        body.append(tuple(cells))
    return tuple(head), body


def in_words(scaled: dict[str, Any]) -> str:
    """What `scaling` found."""
    large, small = scaled["pixels"]
    return (
        f"image scaling: to make the model see another picture of {small} pixels a side, a"
        f" photograph of {large} has to change until {scaled['psnr']} dB PSNR are left; where"
        f" pixels are picked, {scaled['psnr_nearest']} dB would do (below 20 anybody sees it)"
    )
