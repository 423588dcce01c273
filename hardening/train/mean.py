"""The mean of networks that one network was fine-tuned to, which no picture costs more than one.

Sources: Wortsman et al. 2022 ("Model soups"), section 2; of adversarially trained networks, Croce
et al. 2023 ("Seasoning Model Soups for Robustness").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rampart.hardening.model import checkpoint, provenance
from rampart.hardening.model.classifier import Classifier
from rampart.hardening.model.files import read_config
from rampart.hardening.model.pipeline import load_classifier
from rampart.hardening.model.provenance import Prints


def average(files: Sequence[Path], out: Path, *, command: str) -> Classifier:
    """Write the mean of classifiers' weights to `out`, batch statistics included; returns it.

    Its learning curve is that of the first; beside `out` stand the images that any was trained on.
    Raises ValueError for fewer than two files, and for networks that differ in more than their
    weights, or in images that are not listed.
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
    contents = [read_config(file) for file in files]
    prints = images_behind(files, contents)
    states = [net.state_dict() for net in nets]
    first.load_state_dict({name: mean([state[name] for state in states]) for name in states[0]})
    content = {"classifier": first.config._asdict()} | past(contents, command)
    if len(prints):
        provenance.write(out.parent, provenance.union([prints, provenance.read(out.parent)]))
    checkpoint.save(out, first, content)
    return first


def images_behind(files: Sequence[Path], contents: Sequence[dict[str, Any]]) -> Prints:
    """The images that any of the networks was trained on, as far as they are listed beside the
    files. Raises ValueError where the networks differ in them, and one does not list its own.
    """
    noted = [content.get("images", {}).get("training") for content in contents]
    records = [provenance.read(file.parent) for file in files]
    for file, own, record in zip(files, noted, records, strict=True):
        if own and record is None and any(other not in (None, own) for other in noted):
            raise ValueError(
                f"{file} was trained on other images than the rest, and no {provenance.FILE} beside"
                " it lists them: put it back there"
            )
    return provenance.union(records)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in their type; of counters, the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([one.double() for one in tensors]).mean(0).to(tensors[0].dtype)


def past(contents: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """How the networks of a mean came about, as a file of weights has it."""
    kept = {"history": contents[0]["history"]} if "history" in contents[0] else {}
    if all(content.get("images") == contents[0].get("images", {}) for content in contents):
        kept["images"] = contents[0]["images"]
    words = [str(content.get("training", "not recorded")) for content in contents]
    lines = [line for content in contents for line in content.get("commands", [])]
    lines = list(dict.fromkeys([*lines, command]))
    return kept | {"training": f"mean of {len(contents)}: {'; '.join(words)}", "commands": lines}
