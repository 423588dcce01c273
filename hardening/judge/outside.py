"""Outside the main threat model, and reported as such: L2, a patch, corruptions, resizing."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.data import data_dir
from skimage.metrics import peak_signal_noise_ratio as psnr
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as change

from rampart.handlers.image import decode
from rampart.hardening.attack import cache
from rampart.hardening.attack import ladder as rungs
from rampart.hardening.attack.ladder import Budget
from rampart.hardening.attack.noise import Noise
from rampart.hardening.attack.patch import PLACES, STEPS, patch
from rampart.hardening.attack.pgd import Threat
from rampart.hardening.attack.victims import Victim
from rampart.hardening.judge.alarms import PHOTOGRAPHS
from rampart.hardening.judge.evaluate import PIPELINE_CODE, attack_source, replay
from rampart.hardening.judge.metrics import share
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.card import Row, cell_text
from rampart.hardening.model.images import Images
from rampart.hardening.model.pixels import as_file, to_float, to_uint8

L2 = Threat("L2", 0.5)
ATTACKS = f"joint APGD in L2; a patch of any colours, {PLACES} places of {STEPS} steps"

Corrupt = Callable[[Tensor, Noise], Tensor]  # x (N, 3, H, W) in [0, 1], the same after


def impulses(x: Tensor, noise: Noise) -> Tensor:
    """One pixel in twenty black or white."""
    hit, white = noise.uniform(1, *x.shape[2:]) < 0.05, noise.uniform(1, *x.shape[2:]) < 0.5
    return torch.where(hit, white.to(x), x)


def blurred(x: Tensor, noise: Noise) -> Tensor:
    """A Gaussian of a 32nd of the side."""
    sigma = x.shape[2] / 32
    out: Tensor = change.gaussian_blur(x, [4 * round(sigma) + 1] * 2, [sigma, sigma])
    return out


def shaken(x: Tensor, noise: Noise) -> Tensor:
    """Smeared sideways over five 32nds of the side."""
    reach = 2 * round(x.shape[3] / 32)
    return F.avg_pool2d(F.pad(x, (reach, reach, 0, 0), "replicate"), (1, 2 * reach + 1), 1)


def compressed(x: Tensor, noise: Noise) -> Tensor:
    """JPEG at quality 25."""
    pixels = to_uint8(x).permute(0, 3, 1, 2).cpu()
    return torch.stack([change.jpeg(one, 25) for one in pixels]).to(x.device).float() / 255


# Most families of Hendrycks and Dietterich (2019, section 3), each at one middle strength of ours:
# not CIFAR-10-C, and not to be compared with its figures.
CORRUPTIONS: dict[str, Corrupt] = {
    "Gaussian noise": lambda x, noise: x + 0.06 * noise.normal(*x.shape[1:]),
    "shot noise": lambda x, noise: x + 0.1 * x.sqrt() * noise.normal(*x.shape[1:]),
    "impulse noise": impulses,
    "Gaussian blur": blurred,
    "motion blur": shaken,
    "veil of white": lambda x, noise: 0.6 * x + 0.4,
    "brightness": lambda x, noise: change.adjust_brightness(x, 1.5),
    "darkness": lambda x, noise: change.adjust_brightness(x, 0.5),
    "contrast": lambda x, noise: change.adjust_contrast(x, 0.4),
    "saturation": lambda x, noise: change.adjust_saturation(x, 2.5),
    "pixelate": lambda x, _: F.interpolate(F.adaptive_avg_pool2d(x, 16), size=x.shape[2:]),
    "JPEG, quality 25": compressed,
}


def rows(victims: list[Victim], images: Images, budget: Budget, *, folder: Path) -> Iterator[Row]:
    """Shares of `images` right, and right or rejected, under all that was found."""
    clean = to_float(images.image)
    # An attacker may also leave an image as it is.
    attempts = {"clean": [clean], str(L2): [clean], "patch": [clean]}
    source = attack_source((*PIPELINE_CODE, "attack/patch", "judge/outside"))
    for victim in victims:
        l2 = partial(rungs.joint_apgd, victim.look, threat=L2, budget=budget)
        for name, craft in ((str(L2), l2), ("patch", partial(patch, victim.look))):
            key = f"{source} {victim.fingerprint} {name} {budget}"
            title = f"{victim.name}, {name}"
            attempts[name].append(cache.crafted(folder, key, images, craft, title=title))
    noise = Noise(torch.arange(len(images), device=images.image.device))
    for name, corrupt in CORRUPTIONS.items():
        attempts[name] = [corrupt(clean, noise).clamp(0, 1)]
    for victim in victims:
        for name, attacked in attempts.items():
            after = [replay(victim, x, images, L2) for x in attacked]
            right, safe = ([getattr(a, of) for a in after] for of in ("right", "safe"))
            who = victim.subject
            row: Row = {"threat": name, "subject": who.text, "variant": who.variant}
            row |= {"right": share(np.logical_and.reduce(right))}
            row |= {"right_or_rejected": share(np.logical_and.reduce(safe)), "n": len(images)}
            yield row


def scaling(size: int) -> Row:
    """The image-scaling attack (Quiring et al. 2020, section 3) on the endpoint's resize step: the
    PSNR in dB at which a large photograph shows the model another one, also where pixels are
    picked.
    """
    large = size * max(2, min(8, 2000 // size))  # the endpoint takes 2**24 pixels
    pictures = [decode((Path(data_dir) / name).read_bytes(), large) for name in PHOTOGRAPHS]
    measures = []
    for shown, hidden in zip(pictures, pictures[1:] + pictures[:1], strict=True):
        target = decode(as_file(Image.fromarray(hidden)), size)
        forged = forge(shown, target, Image.Resampling.BICUBIC)
        picked = forge(shown, target, Image.Resampling.NEAREST)
        small = decode(as_file(Image.fromarray(forged)), size).astype(int)
        psnrs = [psnr(shown, other) for other in (forged, picked)]  # type: ignore[no-untyped-call]
        measures.append([*psnrs, np.abs(small - target).mean()])
    means = np.mean(measures, axis=0).round(1).tolist()
    names = ("psnr", "psnr_nearest", "levels_off_target")
    figures = dict(zip(names, means, strict=True))
    return {"pictures": len(pictures), "pixels": [large, size], **figures}


def forge(shown: Pixels, target: Pixels, how: Image.Resampling) -> Pixels:
    """`shown` (S, S, 3) with the least change (in L2) that scales down to `target` (s, s, 3)."""
    eye = Image.fromarray(np.eye(len(shown), dtype=np.float32))
    rows = np.asarray(eye.resize((len(shown), len(target)), how), dtype=np.float64)  # (s, S)
    back = np.linalg.pinv(rows)  # (S, s)
    x = shown.astype(np.float64).transpose(2, 0, 1)
    lacking = target.transpose(2, 0, 1) - rows @ x @ rows.T
    forged = x + back @ lacking @ back.T
    return forged.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and body of a table of the rows, a column a victim."""
    head = ["threat", "images"]
    for subject, variant in dict.fromkeys((row["subject"], row["variant"]) for row in rows):
        name = subject if variant == "-" else variant
        head += [f"{name}: right"] + ([f"{name}: right or rejected"] if variant != "-" else [])
    body: dict[str, list[str]] = {}
    for row in rows:
        cells = body.setdefault(row["threat"], [str(row["n"])])
        shares = ("right", "right_or_rejected") if row["variant"] != "-" else ("right",)
        cells += [cell_text(row[share]) for share in shares]
    return tuple(head), [(threat, *cells) for threat, cells in body.items()]


def in_words(scaled: Row) -> str:
    """What `scaling` found."""
    large, small = scaled["pixels"]
    return (
        f"image scaling: to make the model see another picture of {small} pixels a side, a"
        f" photograph of {large} has to change until {scaled['psnr']} dB PSNR are left; where"
        f" pixels are picked, {scaled['psnr_nearest']} dB would do (below 20 anybody sees it)"
    )
