"""Weights from elsewhere: torchvision's and timm's state dicts, RobustBench's, MadryLab's layout. A
layout is a prefix, under which most of the network's tensors are found, and maybe a normalizer:
tensors of three values called mean and std. Nothing is unpickled, which could run code.
"""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from rampart.hardening.model.classifier import TIMM, Classifier, ClassifierConfig, each_channel
from rampart.hardening.model.faults import Faults
from rampart.hardening.model.normalization import Colour, Normalization
from rampart.hardening.model.presence import check_file

State = dict[str, Tensor]
# What training scripts call the entry that holds the weights.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")
# What they call averages of the weights, which are mostly the better ones.
AVERAGES = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "model_ema_state")
# How RobustBench's and MadryLab's ResNets for CIFAR spell parts of torchvision's names.
SPELLINGS = {"shortcut": "downsample", "linear": "fc"}
MEANS, STDS = ("mean", "new_mean", "mu"), ("std", "new_std", "sigma")
NORMALIZERS = (*MEANS, *STDS)
UNUSED = ("aux", "attacker.")  # parts that only train
CONVERT = (
    "torch.save(torch.load('{name}', weights_only=False){entry}, 'weights.pth')"
    " in the environment that made it"
)


class Adopted(NamedTuple):
    """A classifier with weights from elsewhere, and in words what was taken of them."""

    classifier: Classifier
    lines: list[str]


def take(
    path: Path, config: ClassifierConfig, *, mean: Colour | None = None, std: Colour | None = None
) -> Adopted:
    """The classifier of `config` with the weights of `path`, frozen. A normalizer in the file
    replaces the config's, `mean` and `std` replace either. Raises FileNotFoundError, or ValueError
    that names what does not fit.
    """
    weights, lines = tensors(contents(path), path)
    normalization, origin = normalization_of(config, weights, mean, std)
    lines.append(f"normalization{origin}: mean {normalization.mean}, std {normalization.std}")
    net = Classifier(config._replace(**normalization._asdict()))
    own = library_names(net)
    state = without_prefix(respelled(weights, own), own, path, config.arch)
    there = {name: state[name] for name in own if name in state}
    faults = Faults()
    faults.of(partial(normalization.check, f"the normalization in {path}"))
    faults.of(partial(check_names, path, own, state))
    faults.of(partial(check_sizes, path, config, own, there))
    for check in (check_finite, check_variances, check_layers):
        faults.of(partial(check, path, there))
    faults.tell()
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return Adopted(net.eval().requires_grad_(False), lines)


def check_sizes(path: Path, config: ClassifierConfig, own: State, state: State) -> None:
    """Raise ValueError where a tensor has another size than the network's."""
    wrong = [name for name, tensor in state.items() if own[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        expected, size = tuple(own[name].shape), tuple(state[name].shape)
        # A last layer of another size, and nothing else, is another number of classes.
        heads = all(own[n].shape[:1] == (config.classes,) for n in wrong)
        check = "--classes" if heads else "--arch, --width and --image-size"
        misfit = f"{name} does not fit {config.arch}: expected {expected}, found {size}"
        raise ValueError(f"{path}: {misfit}. Check {check}")


def check_finite(path: Path, state: State) -> None:
    """Raise ValueError for values that are no numbers."""
    endless = [name for name, t in state.items() if not t.isfinite().all()]
    if endless:
        raise ValueError(
            f"{path} holds NaN or infinity in {some(endless)}: training diverged, so use an earlier"
            " checkpoint"
        )


def check_variances(path: Path, state: State) -> None:
    """Raise ValueError for variances that no training leaves."""
    below = [n for n, t in state.items() if n.endswith("running_var") and (t < 0).any()]
    if below:
        raise ValueError(f"{path} holds variances below 0 in {some(below)}: the file is damaged")


def check_layers(path: Path, state: State) -> None:
    """Raise ValueError for layers that were never trained."""
    layers = {name: t for name, t in state.items() if name.endswith("weight") and t.dim() > 1}
    empty = [name for name, t in layers.items() if not t.any()]
    if empty:
        raise ValueError(
            f"{path} holds nothing but 0 in {some(empty)}: save the weights after training"
        )


def some(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def contents(path: Path) -> Any:
    """What a .safetensors file, or a file that torch.save wrote, holds."""
    check_file(path, "weights", "pass a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        return torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(unreadable(path, str(error))) from error


def unreadable(path: Path, message: str) -> str:
    """Why a file does not load without unpickling objects, by torch's `message`, and what to do."""
    if "TorchScript" in message:
        return f"{path} is TorchScript, which holds code: save the state_dict() of what was traced"
    objects = re.findall(r"GLOBAL ([\w.]+)", message)
    if zipfile.is_zipfile(path):  # of torch since 1.6; then the message names one object alone
        with suppress(RuntimeError):  # an archive of something else
            objects = sorted(get_unsafe_globals_in_checkpoint(path))
    if not objects:
        return f"{path} is not a torch.save file, or is truncated: copy or save it again"
    names = entries_in(path)
    entry = next((f"['{name}']" for name in ENTRIES if name in names), ".state_dict()")
    return (
        f"{path} does not load without unpickling {some(objects)}, which could run code. If you"
        f" trust it, save only its tensors: {CONVERT.format(name=path.name, entry=entry)}"
    )


def entries_in(path: Path) -> set[str]:
    """Which of ENTRIES a file of torch.save names, without unpickling it."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith("/data.pkl"))
        content = packed.read(name)
    return {n for n in ENTRIES if b"X" + len(n).to_bytes(4, "little") + n.encode() in content}


def tensors(content: Any, path: Path) -> tuple[State, list[str]]:
    """(the state dict in what a training script saved, which entry that is, in words)."""
    lines: list[str] = []
    while isinstance(content, Mapping):
        state = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
        inner = [name for name in ENTRIES if isinstance(content.get(name), Mapping)]
        averages = [name for name in AVERAGES if isinstance(content.get(name), Mapping)]
        if state and not inner:
            return state, lines
        if not (inner or averages):
            raise ValueError(f"{path} holds no weights under {', '.join(ENTRIES)}: {list(content)}")
        entry = [*inner, *averages][0]
        lines.append(f"weights: entry {entry}")
        if inner and averages:
            lines.append(
                f"  {averages[0]}, an average of the weights, is not used: to use it, save it in a"
                " separate file"
            )
        content = content[entry]
    raise ValueError(f"{path} holds a {type(content).__name__}: save model.state_dict() instead")


def normalization_of(
    config: ClassifierConfig, weights: State, mean: Colour | None, std: Colour | None
) -> tuple[Normalization, str]:
    """(`mean` and `std`, else those beside the network in the file, else the config's; where they
    come from, in words). Raises ValueError for implausible `mean` and `std`.
    """

    def values(names: tuple[str, ...]) -> Colour | None:
        fitting = [t for n, t in weights.items() if n.split(".")[-1] in names and t.numel() == 3]
        if not fitting:
            return None
        red, green, blue = (round(float(value), 6) for value in fitting[0].flatten())
        return red, green, blue

    normalization, origin = Normalization(config.mean, config.std), ""
    file_mean, file_std = values(MEANS), values(STDS)
    if file_mean and file_std:
        normalization, origin = Normalization(file_mean, file_std), " of the file"
        if normalization.is_of_levels():
            normalization, origin = normalization.divided(), " of the file, divided by 255"
    if mean or std:
        normalization = Normalization(mean or normalization.mean, std or normalization.std)
        normalization.check("the normalization that is passed")
        origin = " as passed"
    return normalization, origin


def timm_normalization(arch: str) -> Normalization | None:
    """Mean and std of the pixels behind timm's own weights of a network. None without timm, or for
    a name that it lacks: building the network says so.
    """
    try:
        import timm
    except ImportError:
        return None
    own = timm.models.get_pretrained_cfg(arch.removeprefix(TIMM))
    return Normalization(each_channel(own.mean, 0.0), each_channel(own.std, 1.0)) if own else None


def library_names(net: Classifier) -> State:
    """The network's own tensors by the names that its library gives them."""

    def library_name(name: str) -> str:
        if name.startswith("head."):
            return f"{net.head_name}.{name.removeprefix('head.')}"
        inner = name.removeprefix("backbone.")
        return inner.removeprefix("net.") if net.config.head else inner

    return {library_name(name): tensor for name, tensor in net.state_dict().items()}


def respelled(weights: State, own: State) -> State:
    """`weights` with the names that others spell otherwise as the network has them."""
    parts = {part for name in own for part in name.split(".")}
    renamed = {a: b for a, b in SPELLINGS.items() if b in parts and a not in parts}
    names = {name: ".".join(renamed.get(p, p) for p in name.split(".")) for name in weights}
    if len(set(names.values())) < len(weights):
        return weights
    return {names[name]: tensor for name, tensor in weights.items()}


def without_prefix(weights: State, own: State, path: Path, arch: str) -> State:
    """The tensors of `weights` under the names of `own`; what counts batches may be missing."""
    ends = [(n, n[: -len(w)]) for w in own for n in weights if n == w or n.endswith(f".{w}")]
    if not ends:
        layers = ", ".join(list(weights)[:3])
        raise ValueError(
            f"{path} has none of the layers of {arch}, such as {next(iter(own))}. It has {layers}:"
            " check --arch"
        )
    # MadryLab keeps the network twice, as the model and inside its attacker: take the shorter name.
    counts = Counter(prefix for _, prefix in ends)
    prefix = min(counts, key=lambda p: (-counts[p], len(p)))
    state = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")}
    return state | {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def check_names(path: Path, own: State, state: State) -> None:
    """Raise ValueError where tensors are missing, or are none of the network's."""
    rest = {n: t for n, t in state.items() if n not in own and not n.startswith(UNUSED)}
    unknown = [n for n, t in rest.items() if n.split(".")[-1] not in NORMALIZERS or t.numel() != 3]
    if missing := [name for name in own if name not in state]:
        beside = f"has {some(unknown)} in their place" if unknown else "has no other"
        raise ValueError(
            f"{path} lacks {len(missing)} of the network's tensors, such as {missing[0]}, and"
            f" {beside}: check --arch"
        )
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that the network does not have, such as"
            f" {unknown[0]}: check --arch"
        )
