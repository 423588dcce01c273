"""A model repository for Triton's Python backend: an archive, and the model that answers with it.

Clients send pictures or pixels, and get verdicts as from every other server.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rampart.export.archive import archive as pack
from rampart.export.repository import check_free, place
from rampart.export.unpacking import card_of, name_of, settings_of, unpack
from rampart.handlers.image import MAX_IMAGES
from rampart.handlers.protocols.open_inference import Output
from rampart.handlers.tasks import task_of
from rampart.hardening.model.files import Precision
from rampart.hardening.model.folder import form as chosen

if TYPE_CHECKING:
    from torch import Tensor

    from rampart.hardening.model.pipeline import Variant

CONFIG = """\
# Written by `rampart export --triton --backend python`.
name: "{name}"
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] optional: true allow_ragged_batch: true }},
  {{
    name: "pixels"
    data_type: TYPE_UINT8
    dims: [ -1, -1, 3 ]
    optional: true
    allow_ragged_batch: true
  }}
]
output [
{outputs}
]
# What comes while the graph runs is the next batch. With a bound on the queue or a timeout Triton
# fetches nothing ahead, and a request that comes just as another ends waits half a second.
dynamic_batching {{ }}
# For an archive in fp32 or fp16 on a GPU: KIND_GPU.
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
version_policy: {{ latest {{ num_versions: 2 }} }}
"""
TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}
ERROR = Output("BYTES", lambda verdict: "")  # beside those of a verdict
MODEL = """\
# What Triton loads; the code of this version, and none that is installed, does the work.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rampart.handlers.triton import TritonPythonModel  # noqa: E402, F401
"""


def to_triton_python(
    source: Path,
    repository: Path,
    *,
    version: int = 1,
    form: tuple["Variant | None", Precision | None] = (None, None),
    images: "Tensor | None" = None,
) -> Path:
    """Write an archive (.mar) as a new `version` in a Triton `repository`; its model's folder.

    A model folder in its place is packed in `form`, with the settings that archives have by
    default. Raises ValueError for an archive that is none, or of a Rampart before this.
    """
    with tempfile.TemporaryDirectory() as scratch:
        archive = source
        if source.suffix != ".mar":
            archive = Path(scratch) / f"{source.name}.mar"
            variant, precision = chosen(source, *form)
            pack(source, archive, variant=variant, precision=precision, images=images)
        content = Path(scratch) / "content"
        if "rampart/handlers/triton.py" not in unpack(archive, content):
            raise ValueError(f"{archive} was built by a Rampart without Triton support: rebuild it")
        model = name_of(content)
        home = repository / model
        check_free(home, version)
        hidden = {"p_value"} if settings_of(content).get("detail") == "public" else set()
        outputs = ",\n".join(
            f'  {{ name: "{name}" data_type: {TYPES[output.datatype]} dims: {sides(output)} }}'
            for name, output in (task_of(card_of(content)).outputs | {"error": ERROR}).items()
            if name not in hidden
        )
        (content / "model.py").write_text(MODEL)
        config = CONFIG.format(name=model, batch=MAX_IMAGES, outputs=outputs)
        place(home, version, {"config.pbtxt": config}, content)
    return home


def sides(output: Output) -> str:
    """The shape of an output for one picture."""
    return f"[ {', '.join(map(str, output.sides or (1,)))} ]"
