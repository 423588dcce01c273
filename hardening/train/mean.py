"""The mean of networks that one network was fine-tuned to, which no picture costs more than one.

Sources: Wortsman et al. 2022 ("Model soups"), section 2; of adversarially trained networks, Croce
et al. 2023 ("Seasoning Model Soups for Robustness").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rampart.hardening.model import checkpoint
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.files import read_config
from rampart.hardening.model.pipeline import load_classifier


def average(files: Sequence[Path], out: Path, *, command: str) -> Classifier:
    """Write the mean of classifiers' weights to `out`, batch statistics included; returns it.

    Its learning curve and its images are those of the first. Raises ValueError for fewer than two
    files, and for networks that differ in more than their weights.
    """
    if len(files) < 2:
        raise ValueError("a mean of one network is that network: name two files or more")
    nets = [load_classifier(file) for file in files]
    first = nets[0]
    for file, net in zip(files, nets, strict=True):
        if net.config != first.config:
            raise ValueError(
                f"{file} holds another network than {files[0]}: average networks that you"
                " fine-tuned from the same weights"
            )
    states = [net.state_dict() for net in nets]
    first.load_state_dict({name: mean([state[name] for state in states]) for name in states[0]})
    checkpoint.save(out, first, {"classifier": first.config._asdict()} | past(files, command))
    return first


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in their type; of counters, the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([one.double() for one in tensors]).mean(0).to(tensors[0].dtype)


def past(files: Sequence[Path], command: str) -> dict[str, Any]:
    """How the networks of a mean came about, as a file of weights has it."""
    contents = [read_config(file) for file in files]
    kept = {name: contents[0][name] for name in ("images", "history") if name in contents[0]}
    words = [str(content.get("training", "not recorded")) for content in contents]
    lines = [line for content in contents for line in content.get("commands", [])]
    lines = list(dict.fromkeys([*lines, command]))
    return kept | {"training": f"mean of {len(files)}: {'; '.join(words)}", "commands": lines}
