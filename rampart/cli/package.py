"""Verbs that turn trained parts into files that are served."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

import rampart as rp
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.provenance import command_line

if TYPE_CHECKING:
    from torch import Tensor

TRAINED, CLEANED = "File of `rampart train`", "File of `rampart purifier`"
FINISHED = "A finished .mar, to calibrate anew"
TRAFFIC = "What its clients send: a folder of pictures"
PIXELS = "Of a request's images, four times as many as JPEGs; default what fits the model, 4194304"
PIXELS += " or more"
FAILURE = "Of purifier or detectors; open: no defence"
DETAIL = "public hides scores and p-values, an oracle for attackers"
OWNER = "Header that tells whose queries to compare; default all"
SHIP = "Into the model's own folder, for `rampart archive` to take without torch"
REPOSITORY = "A Triton model repository, to write the model into"
Detection = Literal["flag", "reject", "shadow"]
Response = Literal["alert", "throttle", "reject"]

verb, app = o.theme("Package")


@verb(
    "calibrate model_store/mine --data cifar10/ --classifier runs/c/classifier.safetensors",
    "calibrate --archive model_store/mine.mar --images my_traffic/",
)
def calibrate(
    folder: Annotated[Path | None, Argument(help="Folder of the model to make")] = None,
    data: Annotated[Path | None, Option(help=o.DATA)] = None,
    classifier: Annotated[Path | None, Option(help=TRAINED)] = None,
    purifier: Annotated[Path | None, Option(help=CLEANED)] = None,
    held: o.Held = None,
    data_name: Annotated[str, Option(help="What the card calls the training data")] = "",
    archive: Annotated[Path | None, Option("--archive", "--model", help=FINISHED)] = None,
    images: Annotated[Path | None, Option(help=TRAFFIC)] = None,
    out: Annotated[Path | None, Option(help="The new .mar; NAME-recalibrated.mar")] = None,
    arch: o.Own = None,
) -> None:
    """Put classifier and purifier together as a model folder and calibrate its variants.

    Without a purifier the folder has the variant `lean` only. With --archive and --images, a
    finished archive is calibrated on pictures of your traffic; its graph stays as it is.
    """
    if archive and images:
        if folder or data or classifier or purifier or held or data_name:
            raise ValueError(
                "--archive and --images go alone, with --out: the archive has the rest"
            )
        from rampart.export.recalibrate import recalibrate as renew

        target = out or archive.with_stem(f"{archive.stem}-recalibrated")
        for line in renew(archive, images, target, command=command_line()).in_words():
            say(line)
        say(f"{target}: serve it with `rampart serve --archive {target}`")
    elif folder and data and classifier and not (archive or images or out):
        from rampart.assembly import assemble
        from rampart.sources import Source

        source, names = Source(data, held), {"data_name": data_name, "command": command_line()}
        say("\n".join(assemble(folder, source, classifier, purifier, **names).summary()))
    else:
        raise ValueError(
            "pass FOLDER --data IMAGES --classifier FILE to make a model folder, or --archive"
            " FILE.mar --images FOLDER to calibrate an archive anew"
        )


@verb("quantize model_store/mine --data cifar10/")
def quantize(
    model: o.Model,
    data: o.Data,
    held: o.Held = None,
    precision: Annotated[Literal["int8", "fp16"], Option(help="For CPUs, for GPUs")] = "int8",
    limit: Annotated[int, Option(min=1, help="So many tuning images give the ranges")] = 512,
    rate: o.Rate = 0.01,
    arch: o.Own = None,
) -> None:
    """Make the int8 or fp16 form of every variant, calibrate it, and hold it to its gate."""
    from rampart.sources import Source
    from rampart.studies import quantize as lower

    source, command = Source(data, held), command_line()
    outcome = lower(model, source, precision, limit=limit, rate=rate, command=command)
    say("\n".join(outcome.lines))


@verb("export model_store/mine --out mine.onnx")
def export(
    model: o.Model,
    out: Annotated[Path | None, Option(help="The .onnx file to write")] = None,
    triton: Annotated[Path | None, Option(help=REPOSITORY)] = None,
    model_version: Annotated[int, Option(min=1, help="Its version there")] = 1,
    tensorrt: Annotated[Path | None, Option(help="The .plan to build, on its GPU")] = None,
    ship: Annotated[bool, Option("--ship", help=SHIP)] = False,
    variant: o.Variant = None,
    precision: o.Precision = None,
    images: o.Gated = None,
    arch: o.Own = None,
) -> None:
    """Write one ONNX graph and prove that it decides as the torch pipeline does."""
    if sum(target is not None for target in (out, triton, tensorrt)) + ship != 1:
        raise ValueError(
            "pass one of --out FILE.onnx, --triton FOLDER for a model repository, --tensorrt"
            " FILE.plan, and --ship"
        )
    subject = rp.Model.load(model)
    form = subject.form(variant, precision)
    few = rp.load_images(images, size=subject.image_size, train=False) if images else None
    if ship:
        from rampart.export.build import ship as build_into

        say(f"{build_into(model, *form)}: `rampart archive` packs it as it is")
    if out:
        say(subject.export(out, form=form, images=few))
        say(f"{out}: {form}")
    if triton:
        home = subject.to_triton(triton, form=form, version=model_version, images=few)
        say(f"{home}: serve it with tritonserver")
    if tensorrt:
        say(subject.to_tensorrt(tensorrt, form=form, images=few))
        say(f"{tensorrt}: pack it with `rampart archive --plan {tensorrt}`")


@verb(
    "archive model_store/mine",
    "archive model_store/mine --on-detection reject --detail public --rate 0.02",
)
def archive(
    model: o.Model,
    out: Annotated[Path | None, Option(help="The .mar; default model_store/NAME.mar")] = None,
    variant: o.Variant = None,
    precision: o.Precision = None,
    plan: Annotated[Path | None, Option(help="Of `rampart export --tensorrt`")] = None,
    images: o.Gated = None,
    model_version: Annotated[str, Option(help="Tells archives of one name apart")] = "1.0",
    rate: o.Rate = 0.01,
    on_detection: Annotated[Detection, Option(help="shadow counts, and says nothing")] = "flag",
    on_failure: Annotated[Literal["closed", "open"], Option(help=FAILURE)] = "closed",
    detail: Annotated[Literal["full", "public"], Option(help=DETAIL)] = "full",
    query_store: o.QueryStore = None,
    on_query_attack: Annotated[Response, Option(help="Needs a query store")] = "alert",
    query_owner: Annotated[str | None, Option(help=OWNER)] = None,
    query_expiry: Annotated[float, Option(help="Seconds to remember a query")] = 3600,
    query_capacity: Annotated[int, Option(help="Queries to remember")] = 100_000,
    max_pixels: Annotated[int | None, Option(help=PIXELS)] = None,
    arch: o.Own = None,
) -> None:
    """Export, check and pack a model folder as one TorchServe archive."""
    # A shipped graph is packed as it is, so this must not need torch.
    from rampart.export.archive import archive as pack
    from rampart.hardening.model import folder as folders

    target = out or model.parent / f"{model.name}.mar"
    policy: dict[str, object] = {
        "false_alarm_rate": rate,
        "on_detection": on_detection,
        "on_failure": on_failure,
        "detail": detail,
        "query_store": query_store,
        "on_query_attack": on_query_attack,
        "query_owner": query_owner,
        "query_expiry": query_expiry,
        "query_capacity": query_capacity,
    }
    policy |= {"max_pixels": max_pixels} if max_pixels else {}
    variant, precision = folders.form(model, variant, precision)
    parity = pack(
        model,
        target,
        variant=variant,
        precision=precision,
        images=gate_images(model, images) if images else None,
        plan=plan,
        version=model_version,
        settings={"rampart": policy},
    )
    say(f"{parity}\n{target}: {variant}, {precision}, {target.stat().st_size / 1e6:.1f} MB")


def gate_images(model: Path, images: Path) -> "Tensor":
    """64 of the images, uint8 (64, H, W, 3), for the parity gate."""
    from rampart.hardening.train.data import spread

    size = rp.Model.load(model).image_size
    return spread(rp.load_images(images, size=size, train=False), 64).image


@verb("inspect model_store/mine.mar")
def inspect(
    file: Annotated[Path, Argument(help="An archive (.mar), a graph (.onnx) or a plan (.plan)")],
    card: Annotated[
        bool, Option("--card", help="The archive's card in full, as JSON, and nothing else")
    ] = False,
) -> None:
    """What a finished file is, its figures and hashes, and whether this machine can run it."""
    from rampart.export import inspection
    from rampart.export.terminal import visible

    if card:
        say(inspection.card_text(file))
        return
    for line in inspection.inspect(file):
        say(visible(line))


@verb("verify mine.mar --signature mine.sig --public-key key.pem")
def verify(
    archive: Annotated[Path, Argument(help="The .mar")],
    signature: Annotated[Path | None, Option(help="Of OpenSSF Model Signing")] = None,
    public_key: Annotated[Path | None, Option(help="Of its signer, PEM")] = None,
) -> None:
    """Check an archive's hashes and, where given, its signature, before it is served."""
    from rampart.export.terminal import visible
    from rampart.export.verification import verify as check

    for line in check(archive, signature, public_key):
        say(visible(line))
