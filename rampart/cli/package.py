"""Verbs that turn trained parts into files that are served."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from typer import Argument, Option

from rampart import inputs
from rampart.cli import options as o
from rampart.cli.options import say
from rampart.provenance import command_line

if TYPE_CHECKING:
    from torch import Tensor

TRAINED, CLEANED = "File from `rampart train`", "File from `rampart purifier`"
MADE, TRAFFIC = "Model folder to write", "Folder of pictures that your clients send"
RENEWED = "The .mar to write; default NAME-recalibrated.mar"
FINISHED = "A finished .mar to recalibrate"
PIXELS = "Pixel limit per request, four times as many for JPEGs; default what fits the model,"
PIXELS += " at least 4194304"
SURE = "Lowest confidence of a box that an object detector returns; default what its card says"
FAILURE = "What to do if the purifier or a detector fails; open: answer without defence"
DETAIL = "public hides scores and p-values, which help attackers"
EXPLAIN = "Explain verdicts on request: scores, and the places in the picture that matter"
OWNER = "Header that names the owner: compare only queries of the same owner; default all queries"
BACKEND = (
    "For --triton: onnxruntime takes pixels and returns the graph's outputs; python also takes"
)
BACKEND += " pictures and returns verdicts, from a model folder or a finished .mar"
VERSION = "Version in the repository of --triton; default 1"
TRITON, BUILT = "Triton model repository to write to", "The .plan to build, on the GPU that runs it"
PACKED, PLANNED = "The .mar; default model_store/NAME.mar", "Plan from `rampart export --tensorrt`"
SHIP = "Write into the model's own folder, so that `rampart archive` needs no torch"
Finished = Annotated[Path | None, Option("--archive", "--model", help=FINISHED), inputs.archive]
Detection = Literal["flag", "reject", "shadow"]
Response = Literal["alert", "throttle", "reject"]

UNSAID = ("max_pixels", "false_alarm_rate", "min_confidence")  # settings that follow from the model

verb, app = o.theme("Package")


class Form(NamedTuple):
    """What is exported of a model, and what proves it."""

    model: Annotated[Path, Argument(help=o.FOLDER)]
    variant: o.Variant = None
    precision: o.Precision = None
    images: o.Gated = None
    arch: o.Own = None

    def gate(self) -> "Tensor | None":
        """The images for the parity gate (64, H, W, 3), if any are named."""
        if self.images is None:
            return None
        from rampart.models import load

        return load(self.model).gate(self.images)


class Settings(NamedTuple):
    """What the archive tells its endpoint."""

    false_alarm_rate: o.Rate = None
    on_detection: Annotated[Detection, Option(help="shadow: only count in metrics")] = "flag"
    on_failure: Annotated[Literal["closed", "open"], Option(help=FAILURE)] = "closed"
    detail: Annotated[Literal["full", "public"], Option(help=DETAIL)] = "full"
    query_store: o.QueryStore = None
    on_query_attack: Annotated[Response, Option(help="Needs a query store")] = "alert"
    query_owner: Annotated[str | None, Option(help=OWNER)] = None
    query_expiry: Annotated[float, Option(help="Seconds to remember a query")] = 3600
    query_capacity: Annotated[int, Option(help="Queries to remember")] = 100_000
    max_pixels: Annotated[int | None, Option(help=PIXELS)] = None
    explain: Annotated[bool, Option("--explain", help=EXPLAIN)] = False
    min_confidence: Annotated[float | None, Option(min=0, max=1, help=SURE)] = None


@verb(
    "calibrate model_store/mine --data cifar10/ --classifier runs/c/classifier.safetensors",
    "calibrate --archive model_store/mine.mar --images my_traffic/",
    together=inputs.calibrating,
)
def calibrate(
    folder: Annotated[Path | None, Argument(help=MADE), inputs.folder_to_write] = None,
    data: Annotated[Path | None, Option(help=o.DATA), inputs.images] = None,
    classifier: Annotated[Path | None, Option(help=TRAINED), inputs.checkpoint] = None,
    purifier: Annotated[Path | None, Option(help=CLEANED), inputs.checkpoint] = None,
    held: o.Held = None,
    data_name: Annotated[str, Option(help="Name of the training data in the card")] = "",
    guarded: o.Guarded = False,
    archive: Finished = None,
    images: Annotated[Path | None, Option(help=TRAFFIC), inputs.pictures] = None,
    out: Annotated[Path | None, Option(help=RENEWED), inputs.new_archive] = None,
    arch: o.Own = None,
    skip_bad: o.SkipBad = False,
) -> None:
    """Combine classifier and purifier into a model folder and calibrate its variants.

    Without a purifier, the folder has only the variant `lean`. With --guarded and without
    --classifier, add the variant `guarded` to a finished folder. With --archive and --images,
    recalibrate a finished archive on pictures from your traffic; its graph stays unchanged.
    """
    if archive and images:
        from rampart.export.recalibrate import recalibrate as renew

        target = out or archive.with_stem(f"{archive.stem}-recalibrated")
        words = renew(archive, images, target, command=command_line()).in_words()
        say(*words, f"{target}: serve it with `rampart serve --archive {target}`")
    elif folder and data:
        from rampart.hardening.model.folder import calibrations
        from rampart.models import add_guarded, assemble

        source, command = o.Source(data, held, skip_bad).open(), command_line()
        if classifier:
            make = partial(assemble, data_name=data_name, guarded=guarded, command=command)
            make(folder, source, classifier, purifier)
        else:
            add_guarded(folder, source, command=command)
        say(*calibrations(folder))


@verb("quantize model_store/mine --data cifar10/")
def quantize(
    subject: o.Subject,
    source: o.Source,
    precision: Annotated[Literal["int8", "fp16"], Option(help="int8: CPU, fp16: GPU")] = "int8",
    limit: Annotated[int, Option(min=1, help="Tuning images that set the value ranges")] = 512,
    rate: o.Rate = None,
) -> None:
    """Build every variant in int8 or fp16, calibrate it, and check it against a gate."""
    from rampart.models import quantize as lower
    from rampart.studies import Study

    study = Study(rate=rate, command=command_line())
    say(*lower(subject.model, source.open(), study, precision, limit=limit).lines)


@verb(
    "export model_store/mine --out mine.onnx",
    "export mine.mar --triton models/ --backend python",
    together=inputs.exporting,
)
def export(
    form: Form,
    out: Annotated[Path | None, Option(help="The .onnx file to write"), inputs.graph] = None,
    triton: Annotated[Path | None, Option(help=TRITON), inputs.folder_to_write] = None,
    backend: Annotated[Literal["onnxruntime", "python"], Option(help=BACKEND)] = "onnxruntime",
    model_version: Annotated[int | None, Option(min=1, help=VERSION)] = None,
    tensorrt: Annotated[Path | None, Option(help=BUILT), inputs.graph] = None,
    ship: Annotated[bool, Option("--ship", help=SHIP)] = False,
) -> None:
    """Write one ONNX graph, and check that it decides like the PyTorch pipeline."""
    if backend == "python":
        assert triton
        from rampart.export.to_triton_python import to_triton_python

        few, wanted = form.gate(), (form.variant, form.precision)
        write = partial(to_triton_python, form.model, triton, version=model_version or 1)
        say(f"{write(form=wanted, images=few)}: serve it with tritonserver")
        return
    from rampart.models import load

    model, few = load(form.model), form.gate()
    chosen = model.form(form.variant, form.precision)
    if ship:
        from rampart.export.build import ship as build_into

        say(f"{build_into(form.model, *chosen)}: `rampart archive` packs it as it is")
    if out:
        say(model.export(out, form=chosen, images=few), f"{out}: {chosen}")
    if triton:
        home = model.to_triton(triton, form=chosen, version=model_version or 1, images=few)
        say(f"{home}: serve it with tritonserver")
    if tensorrt:
        say(model.to_tensorrt(tensorrt, form=chosen, images=few))
        say(f"{tensorrt}: pack it with `rampart archive --plan {tensorrt}`")


@verb(
    "archive model_store/mine",
    "archive model_store/mine --on-detection reject --detail public --rate 0.02",
    together=inputs.packing,
)
def archive(
    form: Form,
    settings: Settings,
    out: Annotated[Path | None, Option(help=PACKED), inputs.new_archive] = None,
    plan: Annotated[Path | None, Option(help=PLANNED), inputs.file] = None,
    model_version: Annotated[str, Option(help="Version of the archive")] = "1.0",
    sample: o.WithSample = True,
    anyway: o.Anyway = False,
) -> None:
    """Export, check and pack a model folder as one TorchServe archive."""
    # A shipped graph is packed as it is, so this must not need torch.
    from rampart.export.archive import archive as pack
    from rampart.hardening.model.folder import form as chosen

    target = out or form.model.parent / f"{form.model.name}.mar"
    variant, precision = chosen(form.model, form.variant, form.precision)
    policy = {k: v for k, v in settings._asdict().items() if k not in UNSAID or v is not None}
    few, terms = form.gate(), {"rampart": policy}
    pack = partial(pack, images=few, plan=plan, version=model_version)
    pack = partial(pack, sample=sample, anyway=anyway)
    say(pack(form.model, target, variant=variant, precision=precision, settings=terms))
    say(f"{target}: {variant}, {precision}, {target.stat().st_size / 1e6:.1f} MB")


@verb("inspect model_store/mine.mar")
def inspect(
    file: Annotated[Path, Argument(help="An archive (.mar), a graph (.onnx) or a plan (.plan)")],
    card: Annotated[bool, Option("--card", help="Print only the archive's card, as JSON")] = False,
) -> None:
    """Show what a file contains, its figures and hashes, and whether this machine can run it."""
    from rampart.export import inspection
    from rampart.export.terminal import visible

    if card:
        say(inspection.card_text(file))
        return
    say(*map(visible, inspection.inspect(file)))


@verb("verify mine.mar --signature mine.sig --public-key key.pem")
def verify(
    archive: Annotated[Path, Argument(help="The .mar")],
    signature: Annotated[Path | None, Option(help="OpenSSF Model Signing signature")] = None,
    public_key: Annotated[Path | None, Option(help="Public key of the signer, PEM")] = None,
) -> None:
    """Check an archive's hashes, and its signature if you pass one, before you serve it."""
    from rampart.export.terminal import visible
    from rampart.export.verification import verify as check

    say(*map(visible, check(archive, signature, public_key)))
