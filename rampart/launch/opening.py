"""An archive opened for a server of any kind, and the OpenAPI document of what is served."""

import json
import os
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rampart.handlers.service import Service
from rampart.handlers.settings import override
from rampart.handlers.telemetry import Metrics

API = Path(__file__).parents[1] / "data" / "openapi.yaml"


class Opened(NamedTuple):
    """A service, and its model's name and version."""

    service: Service
    name: str
    version: str


def open_archive(
    archive: Path,
    metrics: Metrics,
    *,
    copy: Path | None = None,
    workers: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> Opened:
    """The service of an archive, or of a `copy` of it; all `workers` share the cores.

    `changes` go before the archive's settings and those of the environment. Raises ValueError on
    one line.
    """
    with tempfile.TemporaryDirectory(prefix="rampart-") as scratch:
        folder = Path(scratch)
        try:
            with zipfile.ZipFile(copy or archive) as packed:
                model = json.loads(packed.read("MAR-INF/MANIFEST.json"))["model"]
                config: Any = yaml.safe_load(packed.read("model-config.yaml")) or {}
                packed.extractall(folder)
            name, version = str(model["modelName"]), str(model["modelVersion"])
            settings = override(config.get("rampart") or {}, os.environ) | dict(changes or {})
        except OSError as error:
            raise ValueError(
                f"{archive} cannot be unpacked into {folder.parent}: {error.strerror}. Check that"
                " it is there and that the disk has room, or set TMPDIR to another folder"
            ) from error
        except Exception as error:  # of zipfile, zlib, json and yaml: they have no common type
            raise ValueError(f"{archive} is not a Rampart archive: rebuild it") from error
        service = Service.open(
            folder, settings, metrics, name=name, version=version, workers=workers
        )
    return Opened(service, name, version)


def openapi(models: Collection[tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI document, with the names and versions of what is served."""
    api: dict[str, Any] = yaml.safe_load(API.read_text(encoding="utf-8"))
    names = list(dict.fromkeys(name for name, _ in models))
    api["components"]["parameters"]["model"]["schema"]["enum"] = names
    versions = list(dict.fromkeys(version for _, version in models))
    api["components"]["parameters"]["version"]["schema"]["enum"] = versions
    for path, operations in api["paths"].items():
        if path.startswith(("/predictions/", "/explanations/")):  # curl -T sends PUT
            name = f"{operations['post']['operationId']}ByPut"
            operations["put"] = operations["post"] | {"operationId": name}
    return api | {"servers": [{"url": "/"}]}
