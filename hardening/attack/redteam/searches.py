"""Black-box searches for an image that fools: all but `oars` are ART's (1.20.1). Sources: Square,
Andriushchenko et al. 2020; SimBA, Guo et al. 2019; HopSkipJump, Chen et al. 2020; Boundary, Brendel
et al. 2018; OARS, Feng et al. 2023.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rampart.hardening.attack.redteam.probe import Floats, Probe, as_float
from rampart.hardening.model.images import Images

STARTS = 100


def starts(
    images: Images, label: int, generator: np.random.Generator, target: int | None = None
) -> Iterator[Floats]:
    """Float32 (1, 3, H, W) to begin at, first images of other classes, or of the `target`: ART
    begins in noise, which is flagged.
    """
    labels = images.label.numpy()
    others = np.flatnonzero(labels != label if target is None else labels == target)
    for row in generator.permutation(others)[:STARTS]:
        yield as_float(images.image[int(row)].numpy())
    _, height, width, _ = images.image.shape
    for _ in range(STARTS):
        yield generator.random((1, 3, height, width), dtype=np.float32)


def _first_adversarial(probe: Probe, begin: Iterator[Floats]) -> Floats | None:
    """The first start that the endpoint accepts under a label that is wanted."""
    return next((x for x in begin if probe.wanted(probe(x)[0])), None)


def _classifier(probe: Probe, predict: Callable[[Floats], Floats]) -> Any:
    """`predict` as ART's attacks take it."""
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    return BlackBoxClassifierNeuralNetwork(
        predict, probe.x.shape[1:], len(probe.endpoint.classes), clip_values=(0.0, 1.0)
    )


def square(probe: Probe, begin: Iterator[Floats]) -> None:
    """Square attack (Linf), which follows confidences; `begin` is unused."""
    from art.attacks.evasion import SquareAttack

    eps, budget = probe.settings.eps / 255, probe.settings.budget
    # An iteration costs one query; the squares shrink by the share of iterations that have gone.
    classifier = _classifier(probe, probe)
    terms = {"adv_criterion": _is_class, "loss": _lead_over(classifier)} if probe.targeted else {}
    attack = SquareAttack(classifier, eps=eps, max_iter=budget, verbose=False, **terms)
    attack.generate(probe.x, probe.one_hot)


def _is_class(shares: Floats, one_hot: Floats) -> Any:
    """Which rows (N, K) say the wanted class (N, K)."""
    return shares.argmax(1) == one_hot.argmax(1)


def _lead_over(classifier: Any) -> Callable[[Floats, Floats], Floats]:
    """By how much other classes lead before the wanted one (N,): what Square is to lower."""

    def lead(x: Floats, one_hot: Floats) -> Floats:
        shares = classifier.predict(x)
        others: Floats = np.where(one_hot > 0, -np.inf, shares).max(1)
        gap: Floats = others - shares[one_hot > 0]
        return gap

    return lead


def simba(probe: Probe, begin: Iterator[Floats]) -> None:
    """SimBA with low frequencies first, projected onto the Linf ball; follows confidences. One step
    is a cosine as high as the ball allows: of a unit step (H/2)-fold, since its peak is 2/H.
    """
    from art.attacks.evasion import SimBA

    eps = probe.settings.eps / 255
    low, high = probe.x - eps, probe.x + eps
    inside = _classifier(probe, lambda x: probe(np.clip(x, low, high)))
    step = eps * probe.image.shape[0] / 2
    terms = {"epsilon": step, "targeted": probe.targeted, "verbose": False}
    attack = SimBA(inside, "dct", max_iter=probe.settings.budget, **terms)
    attack.generate(probe.x, probe.one_hot)


def hopskipjump(probe: Probe, begin: Iterator[Floats]) -> None:
    """HopSkipJump (Linf), which follows decisions only."""
    from art.attacks.evasion import HopSkipJump

    start = _first_adversarial(probe, begin)
    if start is None:
        return
    classifier = _classifier(probe, probe)
    terms = {"targeted": probe.targeted, "norm": np.inf, "verbose": False}
    attack = HopSkipJump(classifier, max_iter=probe.settings.budget, **terms)
    # ART probes the boundary with noise of a hundredth of a level a pixel, which rounding to 8 bits
    # takes back; this noise has a standard deviation of two levels.
    noise = 2 / 255 * np.sqrt(probe.image.size)
    attack._compute_delta = lambda **_: noise
    attack.generate(probe.x, probe.one_hot, x_adv_init=start)


def boundary(probe: Probe, begin: Iterator[Floats]) -> None:
    """Boundary attack, which follows decisions only and reduces the L2 distance."""
    from art.attacks.evasion import BoundaryAttack

    start = _first_adversarial(probe, begin)
    if start is None:
        return
    terms = {"targeted": probe.targeted, "verbose": False}
    classifier = _classifier(probe, probe)
    attack = BoundaryAttack(classifier, max_iter=probe.settings.budget, **terms)
    attack.generate(probe.x, probe.one_hot, x_adv_init=start)


def oars(probe: Probe, begin: Iterator[Floats]) -> None:
    """Random search for the smallest steps that are answered (OARS); follows confidences."""
    eps, side = probe.settings.eps / 255, probe.image.shape[0]
    generator = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002  # seeded by _attack
    best, share = probe.x, 0.05
    lowest = _distance(probe, best)
    while True:
        blocks = int(generator.choice([side // 8, side // 4, side // 2, side]))
        signs = generator.choice([-eps, eps], (1, 3, blocks, blocks))
        signs *= generator.random((1, 1, blocks, blocks)) < share  # 0 stays as it was
        step = np.repeat(np.repeat(signs, side // blocks, 2), side // blocks, 3)
        step = np.pad(step, [(0, 0), (0, 0), *[(0, side - step.shape[2])] * 2])
        x = np.where(step != 0, np.clip(probe.x + step, 0, 1), best).astype(np.float32)
        confidence = _distance(probe, x)
        share = min(1.0, share * 1.2) if probe.refused else max(0.01, share * 0.98)
        if confidence < lowest:
            best, lowest = x, confidence


def _distance(probe: Probe, x: Floats) -> float:
    """What OARS lowers: the confidence in the true class, or what the wanted one lacks."""
    shares, target = probe(x)[0], probe.settings.target
    return float(shares[probe.label] if target is None else 1 - shares[target])


ATTACKS: dict[str, Callable[[Probe, Iterator[Floats]], None]] = {
    attack.__name__: attack for attack in (square, simba, hopskipjump, boundary, oars)
}
# These need labels alone.
DECISION_BASED = ("hopskipjump", "boundary")
