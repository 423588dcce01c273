"""How a training step makes a batch hard, and the loss that it descends.

Sources: N-FGSM, de Jorge et al. 2022; PGD training, Madry et al. 2018; TRADES, Zhang et al. 2019
(equation 5); MART, Wang et al. 2020 (equation 10); adversarial weights, Wu et al. 2020 (section 4).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks import ATTACKS, Loss, Threat, cross_entropy, pgd
from hardening.models import Classifier

AUXILIARY = 0.3  # weight of GoogLeNet's auxiliary heads (Szegedy et al. 2015, section 5)
# What stands before the robust part of the loss: TRADES' beta, MART's lambda.
TRADES_BETA, MART_LAMBDA = 6.0, 5.0


class Method(NamedTuple):
    """A way to train: `craft` attacks images, `loss` is descended on clean and attacked ones."""

    craft: Callable[[Classifier, Tensor, Tensor, Threat, torch.Generator], Tensor]
    loss: Callable[[Classifier, Tensor, Tensor, Tensor, float], Tensor]


def crafted_by(
    name: str,
) -> Callable[[Classifier, Tensor, Tensor, Threat, torch.Generator], Tensor]:
    """Images that ATTACKS[name] moves away from their label."""

    def craft(
        model: Classifier, x: Tensor, label: Tensor, threat: Threat, generator: torch.Generator
    ) -> Tensor:
        return ATTACKS[name](cross_entropy(model, label), x, threat, generator=generator)

    return craft


def as_they_are(
    model: Classifier, x: Tensor, label: Tensor, threat: Threat, generator: torch.Generator
) -> Tensor:
    """No attack: the control that robustness is measured against."""
    return x


def away_from_itself(
    model: Classifier, x: Tensor, label: Tensor, threat: Threat, generator: torch.Generator
) -> Tensor:
    """Ten steps of eps/4 that move the prediction away from that for x, whatever the label."""
    with torch.no_grad():
        clean = F.softmax(model(x).float(), 1)
    start = 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    return pgd(
        divergence_from(model, clean), x, threat, steps=10, step_size=threat.eps / 4, start=start
    )


def divergence_from(model: Classifier, clean: Tensor) -> Loss:
    """KL(clean || model's prediction), an image each; clean (N, K) are probabilities."""
    return lambda x: F.kl_div(F.log_softmax(model(x).float(), 1), clean, reduction="none").sum(1)


def classification(logits: tuple[Tensor, ...], label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of all heads; what is `smoothing` of each label goes to all classes alike."""
    main, *others = (F.cross_entropy(y.float(), label, label_smoothing=smoothing) for y in logits)
    return main + AUXILIARY * sum(others, torch.zeros_like(main))


def on_attacked(
    model: Classifier, x: Tensor, attacked: Tensor, label: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy on the attacked images."""
    return classification(model.all_logits(attacked), label, smoothing)


def trades(
    model: Classifier, x: Tensor, attacked: Tensor, label: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy on clean images, plus how far the attacked predictions are from theirs."""
    every = model.all_logits(x)
    gap = divergence_from(model, F.softmax(every[0].float(), 1))(attacked)
    return classification(every, label, smoothing) + TRADES_BETA * gap.mean()


def mart(model: Classifier, x: Tensor, attacked: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """Margin-boosted cross-entropy on attacked images; misclassified ones weigh more."""
    clean = F.softmax(model(x).float(), 1)
    attacked_logits = model(attacked).float()
    wrong = F.softmax(attacked_logits, 1).scatter(1, label[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(attacked_logits, label, label_smoothing=smoothing)
    boosted = boosted - (1 - wrong).clamp_min(1e-12).log().mean()
    doubt = 1 - clean.gather(1, label[:, None]).squeeze(1)
    gap = F.kl_div(F.log_softmax(attacked_logits, 1), clean, reduction="none").sum(1)
    return boosted + MART_LAMBDA * (gap * doubt).mean()


METHODS = {
    "standard": Method(as_they_are, on_attacked),
    "nfgsm": Method(crafted_by("n_fgsm"), on_attacked),
    "pgd": Method(crafted_by("pgd10"), on_attacked),
    "trades": Method(away_from_itself, trades),
    "mart": Method(crafted_by("pgd10"), mart),
}


@contextmanager
def adversarial_weights(
    model: nn.Module, loss: Callable[[], Tensor], gamma: float
) -> Iterator[None]:
    """Within, each weight matrix is moved by `gamma` of its norm in the direction that hurts most.

    Gradients taken within are kept by the weights, which are back in place afterwards.
    """
    if not gamma:
        yield
        return
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    steps = [
        gamma * w.norm() / (g.norm() + 1e-12) * g
        for w, g in zip(weights, gradients, strict=True)
        if g is not None
    ]
    moved = [w for w, g in zip(weights, gradients, strict=True) if g is not None]
    before = [w.detach().clone() for w in moved]
    with torch.no_grad():
        for weight, step in zip(moved, steps, strict=True):
            weight.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(moved, before, strict=True):
                weight.copy_(value)
