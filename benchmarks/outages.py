"""What breaks or changes under an endpoint: workers, the disk, Redis, the archive, certificates.

Each breaks something, mends it, and returns a question: whether what it broke is whole again, or
what it changed is served.
"""

import contextlib
import json
import random
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
from fuzz import processes
from server import Redis, pngs

from rampart.handlers import quarantine
from rampart.handlers.queries import watch

MEGABYTES = 64  # of the small disk
GONE = 10.0  # seconds for which the disk is full, or Redis away
REST = max(quarantine.RETRY, watch.RETRY) + 1  # seconds, a worker leaves alone what has failed
DRAIN = 15.0  # seconds that docs/serve.md leaves TorchServe's old version to answer
VERSIONS = ("1.0", "2.0")
SAMPLE = pngs(np.full((1, 32, 32, 3), 90, np.uint8))[0]


class Disk:
    """A small disk of its own under `folder`. Raises CalledProcessError where we may not mount."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._ballast = folder, folder / "ballast"
        options = f"size={MEGABYTES}m,mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "rampart-soak", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self) -> None:
        """Leave no byte."""
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as ballast:
            while ballast.write(bytes(1 << 20)):
                pass

    def empty(self) -> None:
        """Give back what `fill` took."""
        self._ballast.unlink()

    def close(self) -> None:
        """Unmount, though files may be open."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class Certificates:
    """An authority, whose certificate clients trust, and the pair that the endpoint shows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self.trusted = folder, folder / "authority.pem"
        self.pair = folder / "chain.pem", folder / "key.pem"
        self._make("authority", "keyUsage=critical,keyCertSign")
        self.rotate()

    def rotate(self) -> None:
        """Put a new pair in place, one file after the other."""
        signer = ["-CA", str(self.trusted), "-CAkey", str(self._folder / "authority.key")]
        self._make("new", "subjectAltName=IP:127.0.0.1", *signer)
        for suffix, file in zip((".pem", ".key"), self.pair, strict=True):
            (self._folder / f"new{suffix}").replace(file)

    def shown(self, port: int) -> bool:
        """Whether a new connection is shown the pair that is in place."""
        found = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
        return ssl.PEM_cert_to_DER_cert(found) == ssl.PEM_cert_to_DER_cert(self.pair[0].read_text())

    def _make(self, name: str, extension: str, *signer: str) -> None:
        place = self._folder / name
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", f"/CN={name}", "-addext", extension, *signer]
        command += ["-keyout", f"{place}.key", "-out", f"{place}.pem"]
        subprocess.run(command, check=True, capture_output=True)


Whole = Callable[[], bool]


@dataclass
class Site:
    """An endpoint, what stands under it, and what it keeps. None is left out."""

    front: str
    workers: int
    archives: Mapping[str, Path]  # the same model as each of VERSIONS
    served: Path
    scratch: Path
    disk: Disk | None
    redis: Redis | None
    certificates: Certificates | None
    url: str = ""
    version: str = VERSIONS[0]

    @property
    def root(self) -> str:
        """The address before the path."""
        return self.url.partition("/predictions/")[0]

    @property
    def port(self) -> int:
        """Of predictions."""
        return urlsplit(self.url).port or 0

    @property
    def trusted(self) -> Path | None:
        """Who signs what the endpoint shows."""
        return self.certificates.trusted if self.certificates else None

    @property
    def work(self) -> Path:
        """For all that the server writes: on the small disk, if there is one."""
        return self.disk.folder if self.disk else self.scratch

    def options(self) -> list[str]:
        """Of `rampart serve`."""
        store = self.redis.address if self.redis else str(self.work / "queries")
        options = ["--server", self.front, "--workers", str(self.workers), "--query-store", store]
        options += ["--quarantine", str(self.work / "quarantine")]
        if self.certificates:
            chain, key = map(str, self.certificates.pair)
            options += ["--certificate", chain, "--certificate-key", key]
        if self.front == "torchserve":
            options += ["--model-api", "--logs", str(self.work / "logs")]
        return options

    def quarantined(self) -> set[str]:
        """Names of the images kept; they sort by age."""
        return {path.name for path in (self.work / "quarantine").glob("*.png")}

    def alerts(self) -> float:
        """Query attacks that were noticed so far. Raises RequestException."""
        own = self.front == "http"
        root = self.root if own else f"http://127.0.0.1:{self.port + 2}"
        text = requests.get(f"{root}/metrics", verify=self._verify(), timeout=10).text
        lines = [
            line for line in text.splitlines() if line.startswith("rampart_query_alerts_total{")
        ]
        return sum(float(line.split()[1]) for line in lines)

    def serves(self, version: str) -> bool:
        """Whether the default address answers with this version. Raises RequestException."""
        answer = requests.post(self.url, SAMPLE, verify=self._verify(), timeout=10)
        return bool(answer.ok and answer.json()["model"]["version"] == version)

    def manage(self, method: str, path: str) -> None:
        """One call on TorchServe's management. Raises HTTPError where it is refused."""
        (keys,) = self.work.glob("tmp/rampart-*/key_file.json")
        token = json.loads(keys.read_text())["management"]["key"]
        address = f"http://127.0.0.1:{self.port + 1}/models{path}"
        headers = {"Authorization": f"Bearer {token}"}
        requests.request(method, address, headers=headers, timeout=300).raise_for_status()

    def _verify(self) -> str | bool:
        return str(self.trusted) if self.trusted else True


def kill_worker(site: Site) -> Whole:
    """End one worker without notice."""
    victim: psutil.Process = random.choice(processes())
    victim.kill()
    return lambda: victim not in processes()


def fill_disk(site: Site) -> Whole:
    """Fill the disk under quarantine, log, the server's own files and a query store's folder."""
    assert site.disk
    site.disk.fill()
    time.sleep(GONE)
    before = site.quarantined()
    site.disk.empty()
    rested = time.monotonic() + REST
    return lambda: time.monotonic() > rested and bool(site.quarantined() - before)


def stop_redis(site: Site) -> Whole:
    """Stop the Redis that holds the queries, and start it again."""
    assert site.redis
    site.redis.stop()
    time.sleep(GONE)
    site.redis.start()
    rested = time.monotonic() + REST
    return lambda: time.monotonic() > rested


def swap_version(site: Site) -> Whole:
    """Serve another version of the model, as docs/serve.md says for each server."""
    old, new = site.version, VERSIONS[site.version == VERSIONS[0]]
    site.version, name = new, site.served.stem
    beside = Path(shutil.copyfile(site.archives[new], site.served.with_name(f"{name}-{new}.mar")))
    if site.front == "http":
        beside.replace(site.served)
    else:
        known, count = f"?url={beside.name}&model_name={name}", site.workers
        site.manage("POST", f"{known}&initial_workers=1&synchronous=true")
        scale = f"?min_worker={count}&max_worker={count}&synchronous=true"
        site.manage("PUT", f"/{name}/{new}{scale}")  # an archive's own figure wins until then
        site.manage("PUT", f"/{name}/{new}/set-default")
        time.sleep(DRAIN)
        site.manage("DELETE", f"/{name}/{old}")
    return lambda: site.serves(new)


def rotate_certificates(site: Site) -> Whole:
    """Replace the pair that the endpoint shows."""
    shown = site.certificates
    assert shown
    shown.rotate()
    return lambda: shown.shown(site.port)


class Outage(NamedTuple):
    """What `act` breaks or changes, and what is asked of the endpoint then.

    For `window` seconds from its begin requests may be lost, one of each client at most. Within
    `limit` seconds from its end all must be right. Only where it `renews` workers, they may end.
    """

    act: Callable[[Site], Whole]
    window: float
    limit: float
    renews: bool


OUTAGES = {
    "kill": Outage(kill_worker, window=5, limit=30, renews=True),
    "disk": Outage(fill_disk, window=0, limit=20, renews=False),
    "redis": Outage(stop_redis, window=0, limit=20, renews=False),
    "swap": Outage(swap_version, window=0, limit=120, renews=True),
    "certificates": Outage(rotate_certificates, window=0, limit=120, renews=True),
}
