"""How a training step makes a batch hard, and the loss that it descends.

Sources: PGD training, Madry et al. 2018; N-FGSM, de Jorge et al. 2022; TRADES, Zhang et al. 2019
(equation 5); MART, Wang et al. 2020 (equation 10); RSLAD, Zi et al. 2021 (equation 4); adversarial
weights, Wu et al. 2020 (section 4); rectified rejection, Pang et al. 2022 (section 4); GAT (guided
adversarial training), Sriramanan et al. 2020 (section 3.2); FGSM-RS, Wong et al. 2020 (section 4);
convergence stride, Zhao et al. 2023 ("Fast adversarial training with smooth convergence", the form
for batches).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rampart.hardening.attack.pgd import (
    Loss,
    Threat,
    ascent_direction,
    cross_entropy,
    n_fgsm,
    pgd,
    random_start,
)
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.train import distributed
from rampart.hardening.train.convergence import outlying
from rampart.hardening.train.data import Batch

AUXILIARY = 0.3  # weight of GoogLeNet's auxiliary heads (Szegedy et al. 2015, section 5)
# What stands before the robust part of the loss: TRADES' beta, the lambdas of MART and GAT.
TRADES_BETA, MART_LAMBDA, GAT_LAMBDA = 6.0, 5.0, 10.0
RSLAD_ALPHA = 5 / 6  # weight of attacked images, clean ones have the rest


class Method(NamedTuple):
    """A way to train: `craft` attacks images, `loss` is descended on clean and attacked ones."""

    craft: Callable[[Classifier, Batch, Threat, int], Tensor]
    loss: Callable[[Classifier, Batch, Tensor, float], Tensor]
    converges: bool = False  # whether the loss depends on that of past epochs


def in_steps(loss: Loss, batch: Batch, threat: Threat, steps: int, *, start: Tensor) -> Tensor:
    """PGD by eps/4 at ten steps, in proportion at others, at most eps; ValueError for none."""
    if steps < 1:
        raise ValueError(f"--steps {steps}: an attack needs at least one step")
    size = threat.eps * min(1.0, 2.5 / steps)
    return pgd(loss, batch.x, threat, steps=steps, step_size=size, start=start, keep_best=False)


def in_one_step(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """N-FGSM, whatever `steps`."""
    return n_fgsm(cross_entropy(model, batch.label), batch.x, threat, noise=batch.noise)


def in_one_step_from_within(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """FGSM from a random start in the ball, whatever `steps`. As in N-FGSM the step of eps is not
    projected: Zhao et al. bound noise and step by eps each.
    """
    start = random_start(batch.x, threat, batch.noise)
    free = threat._replace(eps=float("inf"))
    loss = cross_entropy(model, batch.label)
    return pgd(loss, batch.x, free, steps=1, step_size=threat.eps, start=start, keep_best=False)


def away_from_the_label(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """PGD on the cross-entropy, from a random start."""
    start = random_start(batch.x, threat, batch.noise)
    return in_steps(cross_entropy(model, batch.label), batch, threat, steps, start=start)


def away_from_itself(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """PGD that moves the prediction away from that for x, whatever the label."""
    with torch.no_grad():
        clean = F.softmax(model(batch.x).float(), 1)
    # At x itself the divergence has no slope.
    start = 0.001 * batch.noise.normal(*batch.x.shape[1:])
    return in_steps(divergence_from(model, clean), batch, threat, steps, start=start)


def guided(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """One step from noise of half of eps: half of the images climb the cross-entropy alone, the
    others the distance from the clean prediction too (the paper alternates between batches).
    """
    with torch.no_grad():
        clean = F.softmax(model(batch.x).float(), 1)
    draws = batch.noise.uniform(*batch.x.shape[1:]) - 0.5
    start = threat.eps / 2 * ascent_direction(draws, threat.norm)
    guide = GAT_LAMBDA * (batch.noise.uniform() < 0.5)

    def loss(x: Tensor) -> Tensor:
        logits = model(x).float()
        gap = (F.softmax(logits, 1) - clean).square().sum(1)
        return F.cross_entropy(logits, batch.label, reduction="none") + guide * gap

    return in_steps(loss, batch, threat, 1, start=start)


def away_from_the_teacher(model: Classifier, batch: Batch, threat: Threat, steps: int) -> Tensor:
    """PGD that moves the prediction away from the teacher's for x."""
    start = random_start(batch.x, threat, batch.noise)
    return in_steps(divergence_from(model, taught(batch)), batch, threat, steps, start=start)


def taught(batch: Batch) -> Tensor:
    """What the teacher says of the batch, (B, K). Raises ValueError where there is none."""
    if batch.soft is None:
        raise ValueError("distillation needs a teacher: pass --teacher classifier.safetensors")
    return batch.soft


def divergence_from(model: Classifier, clean: Tensor) -> Loss:
    """KL(clean || model's prediction), an image each; clean (N, K) are probabilities."""
    return lambda x: F.kl_div(F.log_softmax(model(x).float(), 1), clean, reduction="none").sum(1)


def classification(logits: tuple[Tensor, ...], label: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of all heads; what is `smoothing` of each label goes to all classes alike."""
    main, *others = (F.cross_entropy(y.float(), label, label_smoothing=smoothing) for y in logits)
    return main + AUXILIARY * sum(others, torch.zeros_like(main))


def on_attacked(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy on the attacked images."""
    return classification(model.all_logits(attacked), batch.label, smoothing)


def trades(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy on clean images, plus how far the attacked predictions are from theirs."""
    every = model.all_logits(batch.x)
    gap = divergence_from(model, F.softmax(every[0].float(), 1))(attacked)
    return classification(every, batch.label, smoothing) + TRADES_BETA * gap.mean()


def gat(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy on clean images, plus the squared distance between both predictions."""
    every = model.all_logits(batch.x)
    clean = F.softmax(every[0].float(), 1)
    gap = (F.softmax(model(attacked).float(), 1) - clean).square().sum(1)
    return classification(every, batch.label, smoothing) + GAT_LAMBDA * gap.mean()


def convergent(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy on attacked images, plus that on clean ones where it leaves the neighbourhood
    of the epoch before: upwards it is descended, downwards climbed.
    """
    clean = classification(model.all_logits(batch.x), batch.label, smoothing)
    robust = on_attacked(model, batch, attacked, smoothing)
    if batch.convergence is None:
        return robust
    return robust + outlying(batch.convergence, clean) * clean


def mart(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """Margin-boosted cross-entropy on attacked images; misclassified ones weigh more."""
    label = batch.label
    clean = F.softmax(model(batch.x).float(), 1)
    attacked_logits = model(attacked).float()
    wrong = F.softmax(attacked_logits, 1).scatter(1, label[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(attacked_logits, label, label_smoothing=smoothing)
    boosted = boosted - (1 - wrong).clamp_min(1e-12).log().mean()
    doubt = 1 - clean.gather(1, label[:, None]).squeeze(1)
    gap = F.kl_div(F.log_softmax(attacked_logits, 1), clean, reduction="none").sum(1)
    return boosted + MART_LAMBDA * (gap * doubt).mean()


def rslad(model: Classifier, batch: Batch, attacked: Tensor, smoothing: float) -> Tensor:
    """How far the student is from the robust teacher's word on x, at x and at the attacked."""
    gap = divergence_from(model, taught(batch))
    loss: Tensor = RSLAD_ALPHA * gap(attacked).mean() + (1 - RSLAD_ALPHA) * gap(batch.x).mean()
    return loss


METHODS = {
    "standard": Method(lambda model, batch, threat, steps: batch.x, on_attacked),  # the control
    "nfgsm": Method(in_one_step, on_attacked),
    "fgsm-cs": Method(in_one_step_from_within, convergent, converges=True),
    "gat": Method(guided, gat),
    "pgd": Method(away_from_the_label, on_attacked),
    "trades": Method(away_from_itself, trades),
    "mart": Method(away_from_the_label, mart),
    "rslad": Method(away_from_the_teacher, rslad),
}


def rectification(model: Classifier, features: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy between rectified confidence and the probability of the true label. `features`
    (N, F) without gradients train this head alone (Pang et al. train both).
    """
    with torch.no_grad():
        logits = model.head(features)
        true = F.softmax(logits.float(), 1).gather(1, label[:, None]).squeeze(1)
    trusted = model.rectified_confidence(features, logits).clamp(1e-6, 1 - 1e-6)
    return -(true * trusted.log() + (1 - true) * (1 - trusted).log()).mean()


@contextmanager
def adversarial_weights(
    model: nn.Module, loss: Callable[[], Tensor], gamma: float
) -> Iterator[None]:
    """Within, weight matrices are moved by `gamma` of their norms in the direction that hurts."""
    if not gamma:
        yield
        return
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    moved = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    distributed.average(gradient for _, gradient in moved)
    before = [(weight, weight.detach().clone()) for weight, _ in moved]
    with torch.no_grad():
        for weight, gradient in moved:
            weight.add_(gamma * weight.norm() / (gradient.norm() + 1e-12) * gradient)
    # Autocast keeps bfloat16 copies of weights, and does not see that these have moved.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
        torch.clear_autocast_cache()
