"""What a command names, looked at before torch is imported and data are read.

Each check raises FileNotFoundError or ValueError that names the input and the remedy. None reads
more than the head of a file.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from rampart.hardening.model.presence import ZIP, check_archive, check_file
from rampart.hardening.objects.places import ARCHITECTURES, has_boxes, splits_name

if TYPE_CHECKING:
    from rampart.hardening.model.files import Precision
    from rampart.hardening.model.pipeline import Variant

# What torch's side builds and does, by name; tests hold these to the definitions there.
NETWORKS = (
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "alexnet", "googlenet", "squeezenet1_1",
)  # fmt: skip
Method = Literal["standard", "nfgsm", "fgsm-cs", "gat", "pgd", "trades", "mart", "rslad"]
Activation = Literal["relu", "silu"]
RUNGS = ("pgd20", "autoattack", "autoattack_short", "joint_apgd", "forced_rejection")
TEAM = ("square", "simba", "hopskipjump", "boundary", "oars")
ROWS = (
    "classifier", "+ median", "+ bit_depth", "+ confidence", "+ energy", "+ feature_distance",
    "+ residual", "+ consistency", "+ squeezing", "+ rectified", "lean", "guarded", "+ purifier",
    "+ purifier + reconstruction", "+ purifier + disagreement", "full",
)  # fmt: skip
AUGMENTATIONS = ("flip", "crop", "warp", "cutout", "none")
MIXTURES = ("cutmix",)
# Of object detectors.
OBJECT_METHODS = ("standard", "nfgsm", "pgd")
JITTERS = ("flip", "turn", "crop", "shrink", "light", "none")
Aim = Literal["sum", "alternate", "strongest"]
NO_BOXES = "pass a folder in the layout of VOC or COCO"
Protocol = Literal["rampart", "v2", "torchserve", "tensorflow", "json"]
Scaled = Literal["unit", "bytes", "signed", "imagenet"]
HEADER = re.compile(r"[A-Za-z0-9-]+:[ -~]+")
PAGE = b"<"  # what a web page begins with


def images(path: Path) -> None:
    """Labelled images: an .npz file, CIFAR-10's folder, a folder of class folders, tar shards."""
    if path.suffix == ".tar":
        from rampart.hardening.train.shards import shards_of

        shards_of(path)
        return
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"{path} has no pictures: expected {path}/CLASS/NAME.{{jpg,png,webp}}")
        return
    if path.exists() and path.suffix != ".npz":
        unpacked = f": unpack it, and pass the folder {path.with_suffix('')}"
        packed = path.suffix in (".zip", ".gz", ".tgz", ".xz")
        raise ValueError(
            f"{path} is neither an .npz file nor a folder"
            + (unpacked if packed else ": pass a folder with one sub-folder a class, or an .npz")
        )
    head = check_file(
        path,
        "data",
        "pass an .npz file, a folder of class folders, or the folder that holds"
        f" cifar-10-batches-py (`rampart download cifar10 {path}` fetches it)",
    )
    if not head.startswith(ZIP):
        raise ValueError(
            f"{path} is not an .npz file, or truncated: save it again with numpy.savez(FILE,"
            " image=..., label=...)"
        )


def pictures(path: Path) -> None:
    """A folder of pictures without labels."""
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder of pictures: pass one with pictures that your clients send"
        )


def picture(path: Path) -> None:
    """One picture."""
    check_file(path, "picture", "pass a JPEG, PNG or WebP file")


def weights(path: Path) -> None:
    """A state dict from elsewhere."""
    head = check_file(path, "weights", "pass a .pth, .pt or .safetensors file")
    if head.lstrip().startswith(PAGE):
        raise ValueError(f"{path} is a web page: download the weights file itself")


def checkpoint(path: Path) -> None:
    """Weights as `rampart train`, `purifier` and `adopt` write them."""
    from rampart.hardening.model.files import read_config

    read_config(path)


def folder(model: Path) -> None:
    """A folder of a calibrated model."""
    from rampart.hardening.model.files import read_config
    from rampart.hardening.model.folder import calibrated

    if model.suffix == ".mar":
        raise ValueError(f"{model} is an archive: pass the folder of its model")
    calibrated(model)
    read_config(model / "weights.safetensors")


def guardable(model: Path) -> None:
    """A model folder that has not the variant guarded yet."""
    from rampart.hardening.model.folder import variants_in

    folder(model)
    if "guarded" in variants_in(model):
        raise ValueError(f"{model} has the variant guarded already: leave out --guarded")


def file(path: Path) -> None:
    """A file that is read as it is."""
    check_file(path, "file", "check the path")


def twin(folder: Path) -> None:
    """A folder with the weights of an undefended network."""
    checkpoint(folder / "weights.safetensors")


def archive(path: Path) -> None:
    """An archive as `rampart archive` writes it."""
    check_archive(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or damaged: copy it again, or rebuild it")


def measured(model: Path) -> None:
    """A folder of a calibrated model, an ONNX file, or a folder of such files."""
    if not is_foreign(model):
        folder(model)
    elif not model.is_dir():
        check_file(model, "graph", "name the ONNX file, or the folder of a model")


def is_foreign(model: Path) -> bool:
    """Whether that is an ONNX file, or a folder of such files and no model's."""
    if model.suffix == ".onnx":
        return True
    return not (model / "weights.safetensors").exists() and any(model.glob("*.onnx"))


def served(model: Path) -> None:
    """An archive, or a folder of a calibrated model."""
    (folder if model.is_dir() else archive)(model)


def text(path: Path) -> None:
    """A document that gets a table."""
    check_file(path, "document", "run this in the checkout, or pass the document's path")


def folder_to_write(path: Path) -> None:
    """A folder to make, or to add to."""
    if path.is_file():
        raise ValueError(f"{path} is a file, but a folder is expected: choose another place")
    to_write(path)


def to_write(path: Path) -> None:
    """A file or folder to make: the folder that is to hold it must take files."""
    if re.match("[a-z][a-z0-9+]+:/", str(path)):  # or a folder of that name is made here
        raise ValueError(
            f"{path} is an address: pass a path of this machine, and copy what is written"
        )
    home = path if path.is_dir() else path.absolute().parent
    while not home.exists():
        home = home.parent
    if not home.is_dir():
        raise ValueError(
            f"{path} cannot be written, because {home} is a file: choose another place"
        )
    if not os.access(home, os.W_OK):
        raise ValueError(f"{path} cannot be written: you have no permission to write in {home}")


def file_to_write(path: Path) -> None:
    """A file to make."""
    to_write(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file to write, such as {path / 'NAME'}")


def new_archive(path: Path) -> None:
    """An archive to make."""
    from rampart.export.archive import check_name

    check_name(path)
    file_to_write(path)


def graph(path: Path) -> None:
    """An ONNX graph to make."""
    if path.suffix == ".mar":
        raise ValueError(
            f"{path}: export writes one ONNX graph, as {path.with_suffix('.onnx')}. `rampart"
            f" archive MODEL --out {path}` makes what is served"
        )
    file_to_write(path)


def network(arch: str) -> None:
    """The name of an architecture."""
    if arch in NETWORKS or ":" in arch:
        if arch.startswith("timm:") and find_spec("timm") is None:
            raise ValueError(f"--arch {arch} needs timm: `pip install timm`")
        return
    raise ValueError(
        f"--arch {arch}: choose one of {', '.join(NETWORKS)}, timm:NAME, or a factory of yours as"
        " package.module:factory"
    )


def any_network(arch: str) -> None:
    """The name of an architecture, of a classifier or of an object detector."""
    if not finds_objects(arch):
        network(arch)


def finds_objects(arch: str) -> bool:
    """Whether an architecture is that of an object detector, as ssd-resnet34."""
    return splits_name(arch)[0] in ARCHITECTURES


def scenes(path: Path) -> None:
    """Pictures with boxes."""
    if not has_boxes(path):
        raise ValueError(
            f"{path} has no boxes: pass a folder in the layout of VOC (Annotations, JPEGImages) or"
            " of COCO (annotations/instances_train.json)"
        )


def size(pixels: int) -> None:
    """Pixels a side of the images that a network takes."""
    if pixels < 16 or pixels % 8:
        raise ValueError(f"--image-size {pixels}: use a multiple of 8, at least 16")


def row(name: str) -> None:
    """A row of the ablation."""
    among(name, ROWS, "row")


def rung(name: str) -> None:
    """A rung of the ladder."""
    among(name, RUNGS, "attack")


def augmentation(name: str) -> None:
    """What is done to training images."""
    among(name, AUGMENTATIONS, "augmentation")


def any_augmentation(name: str) -> None:
    """What is done to training images, with boxes or without."""
    among(name, tuple(dict.fromkeys((*AUGMENTATIONS, *MIXTURES, *JITTERS))), "augmentation")


def attack(name: str) -> None:
    """A black-box attack."""
    among(name, TEAM, "attack")


def among(name: str, names: Sequence[str], what: str) -> None:
    """Raise ValueError where no `what` of these has that name."""
    if name not in names:
        raise ValueError(f"no {what} {name}: choose among {', '.join(names)}")


def address(url: str) -> None:
    """Where an endpoint takes predictions."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is not a URL like http://127.0.0.1:8080/predictions/NAME")


def training(
    method: str, teacher: Path | None = None, smoothing: float = 0, steps: int = 1
) -> None:
    """What belongs together in a recipe of training."""
    if (method == "rslad") != bool(teacher):
        raise ValueError("--method rslad and --teacher go together: rslad distils from the teacher")
    if method == "rslad" and smoothing:
        raise ValueError("--smoothing does not work with rslad: its labels come from the teacher")
    if steps < 1:
        raise ValueError(f"--steps {steps}: an attack needs at least one step")


def learning(
    *,
    data: Path,
    arch: str | None,
    head: str,
    channels: int,
    channels_last: bool,
    method: str,
    teacher: Path | None,
    smoothing: float,
    steps: int,
    awp: float,
    rectify: bool,
    compile: bool,
    activation: str,
    balance: float,
    augment: list[str] | None,
    aim: str | None,
    passes: int | None,
) -> None:
    """What belongs together in a training: boxes in the data make it one of an object detector."""
    training(method, teacher, smoothing, steps)
    boxes = has_boxes(data)
    task(data, arch, boxes=boxes)
    augmenting(augment, method, boxes=boxes, rectify=rectify)
    if not boxes:
        if aim or passes:
            raise ValueError(f"--aim and --passes go with boxes, but {data} has none: {NO_BOXES}")
        return
    among(method, OBJECT_METHODS, "method of object detectors")
    given = own_classifier(head, channels, last=channels_last) | {"--smoothing": smoothing}
    given |= {"--awp": awp, "--rectify": rectify, "--compile": compile}
    of_classifiers(data, given | {"--activation": activation != "relu", "--balance": balance})


def augmenting(
    augment: list[str] | None, method: str, *, boxes: bool, rectify: bool = False
) -> None:
    """Augmentations that fit the pictures, and mixed ones what is trained on them."""
    for name in augment or []:
        known = JITTERS if boxes else (*AUGMENTATIONS, *MIXTURES)
        among(name, known, "augmentation of such pictures")
    mixed = set(augment or []) & set(MIXTURES)
    if mixed and (method == "mart" or rectify):
        other = "--rectify" if rectify else "--method mart"
        raise ValueError(
            f"--augment cutmix does not go with {other}, which takes one label an image"
        )


def own_classifier(head: str, channels: int, *, last: bool) -> dict[str, object]:
    """The options of a classifier of your own, and whether each is used."""
    return {"--head": head, "--channels": channels != 3, "--channels-last": last}


def of_classifiers(data: Path, given: Mapping[str, object]) -> None:
    """Raise ValueError where an option of classifiers is `given` for pictures with boxes."""
    if named := [option for option, value in given.items() if value]:
        raise ValueError(f"{named[0]} is for classifiers, but {data} has boxes: leave it out")


def cleaning(*, data: Path, classifier: Path, augment: list[str] | None) -> None:
    """What belongs together in a purifier's training: boxes, and a network that finds objects."""
    from rampart.hardening.model.files import read_config

    boxes = has_boxes(data)
    if boxes != (read_config(classifier).get("task") == "detect"):
        words = (
            f"an object detector, but {data} has no boxes",
            f"a classifier, but {data} has boxes",
        )
        raise ValueError(
            f"--classifier {classifier} is {words[boxes]}: pass what it was trained on"
        )
    for name in augment or []:
        among(name, JITTERS if boxes else AUGMENTATIONS, "augmentation of such pictures")


def attacking(*, norm: str, queries: int, crafted_on: Path | None, into_card: bool) -> None:
    """What belongs together in attacks on an object detector."""
    if queries and norm != "Linf":
        raise ValueError(f"--queries {queries}: the random search is of Linf alone: leave it out")
    if crafted_on and into_card:
        raise ValueError(
            "--into-card does not go with --crafted-on: the card holds what attacks with full"
            " knowledge of the model find. Leave out one of them"
        )


def task(data: Path, arch: str | None, *, boxes: bool) -> None:
    """Data with boxes and an object detector, or neither."""
    if arch and finds_objects(arch) and not boxes:
        raise ValueError(f"--arch {arch} finds objects, but {data} has no boxes: {NO_BOXES}")
    own = arch and ":" in arch and not arch.startswith("timm:")  # it may be either
    if arch and boxes and not finds_objects(arch) and not own:
        raise ValueError(
            f"{data} has boxes, but --arch {arch} is a classifier: choose one of"
            f" {', '.join(ARCHITECTURES)}, as ssd or ssd-resnet34, or a factory of yours"
        )


def whole_way(
    *,
    data: Path,
    arch: str | None,
    head: str,
    channels: int,
    channels_last: bool,
    weights: Path | None,
    epochs: int | None,
    method: str,
    activation: str,
    balance: float | None,
    augment: list[str] | None,
    purifier_epochs: int | None,
) -> None:
    """What belongs together on the whole way from images, with boxes or without."""
    hardening(weights, epochs, method)
    boxes = has_boxes(data)
    task(data, arch, boxes=boxes)
    augmenting(augment, method, boxes=boxes)
    if not boxes:
        return
    among(method, OBJECT_METHODS, "method of object detectors")
    given = own_classifier(head, channels, last=channels_last)
    of_classifiers(data, given | {"--activation": activation != "relu", "--balance": balance})
    if epochs == 0:
        raise ValueError(
            "--epochs 0: an object detector is trained here; `rampart calibrate` takes a finished"
            " one"
        )
    if weights:
        checkpoint(weights)
    if purifier_epochs:
        raise ValueError(
            "--purifier-epochs is for classifiers: `rampart purifier` trains an object detector's"
        )


def hardening(weights: Path | None, epochs: int | None, method: str) -> None:
    """What belongs together on the whole way, in one process."""
    if "RANK" in os.environ:
        raise ValueError("torchrun starts `rampart train` and `rampart purifier`, not the others")
    if epochs == 0 and not weights:
        raise ValueError("nothing to harden: pass --weights, or --epochs above 0 to train")
    if method == "rslad":
        raise ValueError(
            "--method rslad needs a teacher: use `rampart train`, because harden takes none"
        )


def sample(held: Path | None, part: str | None) -> None:
    """What belongs together in images to measure on."""
    if held and not part:
        raise ValueError("--held needs --part: without it, pass only --images")


def evaluation(
    *,
    model: Path,
    variant: str | None,
    rung: Sequence[str] | None,
    held: Path | None,
    part: str | None,
    int8: bool,
    fp16: bool,
    twin: Path | None,
    gallery: Path | None,
    into_card: bool,
) -> None:
    """What belongs together in an evaluation."""
    if is_foreign(model):
        measured(model)
        given = {"--variant": variant, "--held": held, "--part": part, "--int8": int8}
        given |= {"--fp16": fp16, "--twin": twin, "--into-card": into_card}
        given |= {"--gallery": gallery} if model.is_dir() else {}
        if named := [option for option, value in given.items() if value]:
            raise ValueError(f"{model} is not a Rampart model: leave out {', '.join(named)}")
        return
    alone(variant, rung)
    sample(held, part)
    form(model, variant)
    if int8:
        lowered(model, variant, "int8")
    if fp16:
        lowered(model, variant, "fp16")


def lowered(model: Path, variant: str | None, precision: "Precision") -> None:
    """A form in lower precision that was made, of one variant or of all."""
    from rampart.export.shipped import check_made
    from rampart.hardening.model.folder import variants_in

    for each in [variant] if variant else variants_in(model):
        check_made(model, each, precision)


def alone(variant: str | None, rung: Sequence[str] | None) -> None:
    """A variant that is attacked alone."""
    if variant and not rung:
        raise ValueError("--variant needs --rung: worst cases include the attacks on all variants")


def ablation(row: Sequence[str] | None, test: Path | None, twin: Path | None) -> None:
    """What belongs together in an ablation."""
    if row and (test or twin):
        raise ValueError("--row does not work with --test or --twin, which have their own rows")


def form(model: Path, variant: str | None) -> None:
    """A variant that a model is calibrated for."""
    from rampart.hardening.model.folder import variants_in

    folder(model)
    if variant and variant not in variants_in(model):
        raise ValueError(f"{model} is not calibrated as {variant}: leave out --variant")


def purifying(model: Path) -> None:
    """A model that has a purifier."""
    from rampart.hardening.model.folder import variants_in

    folder(model)
    if "full" not in variants_in(model):
        raise ValueError(
            f"{model} has no purifier: pass a model that has one, such as model_store/cifar10"
        )


def purified(model: Path, held: Path | None, part: str | None) -> None:
    """A model that has a purifier, and images to measure it on."""
    purifying(model)
    sample(held, part)


def certifying(sigma: float, samples: int, alpha: float) -> None:
    """What a certificate can be made with."""
    if sigma <= 0 or samples < 1 or not 0 < alpha < 0.5:
        raise ValueError(
            f"--sigma {sigma:g} --samples {samples} --alpha {alpha:g}: the first two must be above"
            " 0, and alpha between 0 and 0.5"
        )


def calibrating(
    *,
    folder: Path | None,
    data: Path | None,
    classifier: Path | None,
    archive: Path | None,
    images: Path | None,
    out: Path | None,
    purifier: Path | None,
    held: Path | None,
    data_name: str,
    guarded: bool,
    skip_bad: bool,
) -> None:
    """What belongs together in a calibration: of a model folder, or of an archive anew."""
    made = folder or data or classifier
    if archive and images:
        if made or purifier or held or data_name or guarded or skip_bad:
            raise ValueError("--archive and --images take only --out: the archive has the rest")
    elif not (folder and data and (classifier or guarded)) or archive or images or out:
        raise ValueError(
            "pass FOLDER --data IMAGES --classifier FILE to make a model folder, FOLDER --data"
            " IMAGES --guarded to add that variant to one, or --archive FILE.mar --images FOLDER to"
            " recalibrate an archive"
        )
    elif not classifier:
        if purifier or data_name:
            raise ValueError("--guarded without --classifier takes only --data, --held, --skip-bad")
        guardable(folder)


def exporting(
    *,
    model: Path,
    variant: "Variant | None",
    precision: "Precision | None",
    out: Path | None,
    triton: Path | None,
    tensorrt: Path | None,
    ship: bool,
    backend: str,
    images: Path | None,
    model_version: int | None,
) -> None:
    """What belongs together in an export."""
    if sum(target is not None for target in (out, triton, tensorrt)) + ship != 1:
        raise ValueError(
            "pass one of --out FILE.onnx, --triton FOLDER for a model repository, --tensorrt"
            " FILE.plan, and --ship"
        )
    if backend == "python" and not triton:
        raise ValueError("--backend python needs --triton FOLDER")
    if model_version and not triton:
        raise ValueError("--model-version is of a model repository: it needs --triton FOLDER")
    if ship and images:
        raise ValueError("--ship does not take --images: what ships is compared on fixed crops")
    if model.suffix == ".mar" and backend == "python":
        archive(model)
        given = {"--variant": variant, "--precision": precision, "--images": images}
        if named := [option for option, value in given.items() if value]:
            raise ValueError(f"{model} is packed already: leave out {', '.join(named)}")
        return
    form(model, variant)
    if tensorrt and precision == "int8":
        raise ValueError("int8 is for CPUs: build the plan with --precision fp32 or fp16")
    if precision:
        from rampart.hardening.model.folder import form as chosen

        lowered(model, chosen(model, variant, precision)[0], precision)


def packing(
    *,
    model: Path,
    variant: str | None,
    precision: "Precision | None",
    out: Path | None,
    model_version: str,
    plan: Path | None,
) -> None:
    """What belongs together in an archive."""
    from rampart.export.archive import check_request

    form(model, variant)
    check_request(out or Path(f"{model}.mar"), model_version, plan, precision or "fp32")


def header(line: str) -> None:
    """A line of an HTTP header."""
    if not HEADER.fullmatch(line):
        raise ValueError(f"--header {line.partition(':')[0]}: write it as 'NAME: VALUE'")


def redteaming(url: str, eps: int, queries: int) -> None:
    """What a red team is told of its endpoint."""
    address(url)
    if min(eps, queries) < 1:
        raise ValueError(f"--eps {eps} --queries {queries}: both must be at least 1")
