"""Weights from elsewhere: torchvision's and timm's state dicts, RobustBench's, MadryLab's layout. A
layout is a prefix, under which most of the network's tensors are found, and maybe a normalizer:
tensors of three values called mean and std. Nothing is unpickled, which could run code.
"""

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rampart.hardening.model.classifier import Classifier, ClassifierConfig

Colour = tuple[float, float, float]  # red, green, blue
State = dict[str, Tensor]
# What training scripts call the entry that holds the weights.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")
MEANS, STDS = ("mean", "new_mean", "mu"), ("std", "new_std", "sigma")
NORMALIZERS = (*MEANS, *STDS)
UNUSED = ("aux", "attacker.")  # parts that only train
CONVERT = (
    "torch.save(torch.load('{name}', weights_only=False)['state_dict'], 'weights.pth')"
    " in the environment that made it"
)


def adopt(
    path: Path, config: ClassifierConfig, *, mean: Colour | None = None, std: Colour | None = None
) -> Classifier:
    """The classifier of `config` with the weights of `path`, frozen. A normalizer in the file
    replaces the config's, `mean` and `std` replace either. Raises FileNotFoundError, or ValueError
    that names a layer which does not fit.
    """
    weights = read(path)
    config = normalized(config, weights)
    config = config._replace(mean=mean or config.mean, std=std or config.std)
    net = Classifier(config)
    own = library_names(net)
    state = without_prefix(weights, own, path)
    wrong = [name for name, tensor in own.items() if state[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        expected, size = tuple(own[name].shape), tuple(state[name].shape)
        # A last layer of another size, and nothing else, is another number of classes.
        heads = all(own[n].shape[:1] == (config.classes,) for n in wrong)
        check = "--classes" if heads else "--arch, --width and --image-size"
        misfit = f"{name} does not fit {config.arch}: expected {expected}, found {size}"
        raise ValueError(f"{path}: {misfit}. Check {check}")
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return net.eval().requires_grad_(False)


def read(path: Path) -> State:
    """The tensors of a .safetensors file or of a file that torch.save wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        content: Any = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not load without unpickling objects, which could run code"
            f" ({str(error).splitlines()[0]}). Where you trust it, keep its tensors alone:"
            f" {CONVERT.format(name=path.name)}"
        ) from error
    return tensors(content, path)


def tensors(content: Any, path: Path) -> State:
    """The state dict in what a training script saved."""
    while isinstance(content, Mapping):
        state = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
        inner = [name for name in ENTRIES if isinstance(content.get(name), Mapping)]
        if state and not inner:
            return state
        if not inner:
            raise ValueError(f"{path} holds no weights under {', '.join(ENTRIES)}: {list(content)}")
        content = content[inner[0]]
    raise ValueError(f"{path} holds a {type(content).__name__}: save model.state_dict() instead")


def normalized(config: ClassifierConfig, weights: State) -> ClassifierConfig:
    """`config` with the mean and std that the file carries beside the network."""

    def values(names: tuple[str, ...]) -> Colour | None:
        fitting = [t for n, t in weights.items() if n.split(".")[-1] in names and t.numel() == 3]
        if not fitting:
            return None
        red, green, blue = (round(float(value), 6) for value in fitting[0].flatten())
        return red, green, blue

    mean, std = values(MEANS), values(STDS)
    return config._replace(mean=mean, std=std) if mean and std else config


def library_names(net: Classifier) -> State:
    """The network's own tensors by the names that its library gives them."""

    def library_name(name: str) -> str:
        if name.startswith("head."):
            return f"{net.head_name}.{name.removeprefix('head.')}"
        inner = name.removeprefix("backbone.")
        return inner.removeprefix("net.") if net.config.head else inner

    return {library_name(name): tensor for name, tensor in net.state_dict().items()}


def without_prefix(weights: State, own: State, path: Path) -> State:
    """The tensors of `weights` under the names of `own`; what counts batches may be missing."""
    ends = [(n, n[: -len(w)]) for w in own for n in weights if n == w or n.endswith(f".{w}")]
    if not ends:
        layers = ", ".join(list(weights)[:3])
        raise ValueError(f"{path} holds none of the network's layers, but {layers}")
    # MadryLab keeps the network twice, as the model and inside its attacker: take the shorter name.
    counts = Counter(prefix for _, prefix in ends)
    prefix = min(counts, key=lambda p: (-counts[p], len(p)))
    state = {name: t for name, t in own.items() if name.endswith("num_batches_tracked")}
    state |= {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    if missing := [name for name in own if name not in state]:
        raise ValueError(f"{path} lacks {len(missing)} of the network's tensors, as {missing[0]}")
    rest = {n: t for n, t in state.items() if n not in own and not n.startswith(UNUSED)}
    unknown = [n for n, t in rest.items() if n.split(".")[-1] not in NORMALIZERS or t.numel() != 3]
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that the network has no place for, as"
            f" {unknown[0]}: check --arch"
        )
    return state
