"""A certificate for one image: randomized smoothing over the classifier, in L2. It certifies a vote
under Gaussian noise, and not the endpoint. Source: Cohen et al. 2019 (section 3.2.2, CERTIFY), with
the bound of Clopper and Pearson (1934).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import binomtest, norm
from torch import Tensor
from tqdm import tqdm

from rampart.hardening.attack.noise import Noise

BATCH = 256


class Certificate(NamedTuple):
    """The smoothed label with its radius; `label` is None where it abstains."""

    label: int | None
    radius: float  # L2, of pixels in [0, 1]
    votes: int  # of the `samples` noisy copies
    samples: int
    sigma: float
    alpha: float


def certify(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    sigma: float,
    samples: int = 10_000,
    guesses: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
) -> Certificate:
    """Certify one image x (1, 3, H, W) in [0, 1] under Gaussian noise of `sigma`, in float32: with
    probability 1 - alpha no image within the radius has another smoothed label. Raises ValueError
    for sigma, alpha or counts out of range.
    """
    if sigma <= 0 or not 0 < alpha < 0.5 or min(samples, guesses) < 1:
        raise ValueError("sigma and the samples must be above 0, and alpha between 0 and 0.5")
    # The guess and the count are of different draws, or the bound would not hold.
    guess = int(votes(model, x, sigma, range(guesses), seed=seed).argmax())
    rest = range(guesses, guesses + samples)
    count = int(votes(model, x, sigma, rest, seed=seed)[guess])
    test = binomtest(count, samples, alternative="greater")
    low = float(test.proportion_ci(confidence_level=1 - alpha, method="exact").low)
    if low <= 0.5:
        return Certificate(None, 0.0, count, samples, sigma, alpha)
    return Certificate(guess, sigma * float(norm.ppf(low)), count, samples, sigma, alpha)


def votes(
    model: Callable[[Tensor], Tensor], x: Tensor, sigma: float, draws: range, *, seed: int
) -> Tensor:
    """How many noisy copies of x got each label (K,); each of `draws` names one copy's noise."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in tqdm(range(draws.start, draws.stop, BATCH), desc="certify", leave=False):
        index = torch.arange(first, min(first + BATCH, draws.stop), device=x.device)
        noisy = x + sigma * Noise(index, seed=seed).normal(*x.shape[1:])
        with torch.no_grad():
            logits = model(noisy)
        total = total + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return total


def in_words(proof: Certificate, classes: tuple[str, ...]) -> str:
    """What a certificate says, and what it does not."""
    vote = f"{proof.votes} of {proof.samples} noisy copies (sigma {proof.sigma:g})"
    if proof.label is None:
        wrong = f"wrong in at most {proof.alpha:g}"
        return f"abstains: {vote} agree, too few for a certificate that is {wrong}"
    radius = math.floor(proof.radius * 1000) / 1000  # never more than was certified
    return (
        f"{classes[proof.label]}: the smoothed label holds within an L2 radius of {radius:.3f}"
        f" (pixels in [0, 1]), by {vote}; wrong in at most {proof.alpha:g} of such certificates."
        " This holds only for the smoothed classifier and for L2"
    )
