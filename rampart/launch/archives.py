"""The archives that a server of ours serves: copies, which change once a new archive has answered.

Workers open the copies. So an archive that is broken, half written or away stops nobody, whenever a
worker has to begin anew.
"""

import multiprocessing
import shutil
import threading
import time
from pathlib import Path

from rampart.launch.console import say
from rampart.launch.endpoint import LaunchError, read_model
from rampart.launch.job import Job
from rampart.launch.trial import try_archive

TRIAL_SECONDS = 600.0  # in which a new archive must answer; TensorRT may build an engine first

Stamp = tuple[int, int]  # time of the last change in ns, size


class Archives:
    """Those of a job. Raises LaunchError where one cannot be copied."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._paths = [Path(archive) for archive in job.archives]
        self._seen = [stamp_of(path) for path in self._paths]
        self._served = list(self._seen)
        for index, path in enumerate(self._paths):
            try:
                shutil.copyfile(path, job.copy_of(index))
            except OSError as error:
                raise LaunchError(_uncopied(path, job, error)) from error

    def renew(self, ends: threading.Event) -> bool:
        """Take up archives that have changed since; whether there is one. Call it once a second.

        One that does not answer is told and left. Returns early where the server `ends`.
        """
        before, self._seen = self._seen, [stamp_of(path) for path in self._paths]
        taken = False
        for index, stamp in enumerate(self._seen):
            still = stamp is not None and stamp == before[index]
            if still and stamp != self._served[index]:
                self._served[index] = stamp
                taken |= self._take(index, ends)
        return taken

    def _take(self, index: int, ends: threading.Event) -> bool:
        path, draft = self._paths[index], self._job.copy_of(index).with_suffix(".new.mar")
        try:
            shutil.copyfile(path, draft)
            if answers := self._answers(index, draft, ends):
                self._check_name(index, draft)
        except OSError as error:
            say(f"error: {_uncopied(path, self._job, error)}")
            answers = False
        except LaunchError as error:
            say(f"error: {str(error).replace(str(draft), str(path))}")
            answers = False
        if answers:
            draft.replace(self._job.copy_of(index))
            return True
        draft.unlink(missing_ok=True)  # it may be what fills the disk
        if not ends.is_set():
            say(f"{path} is not taken: the old archive stays in service")
        return False

    def _check_name(self, index: int, draft: Path) -> None:
        """Raise LaunchError where the addresses of this archive's model, or another's, would change
        their meaning.
        """
        (name, version), (old, _) = read_model(draft), read_model(self._job.copy_of(index))
        if name != old:
            raise LaunchError(
                f"{draft} has the model {name}, and clients ask for {old}: restart the server to"
                " serve it under its name"
            )
        others = [read_model(self._job.copy_of(i)) for i in range(len(self._paths)) if i != index]
        if (name, version) in others:
            raise LaunchError(
                f"{draft} has the name and version of another archive here, {name} {version}: give"
                " it another --model-version"
            )

    def _answers(self, index: int, draft: Path, ends: threading.Event) -> bool:
        """Try an archive in a process of its own, on the device that it will be served on."""
        spawn = multiprocessing.get_context("spawn")
        trial = spawn.Process(target=try_archive, args=(index, str(draft)), daemon=True)
        end = time.monotonic() + TRIAL_SECONDS
        trial.start()
        while trial.is_alive() and time.monotonic() < end and not ends.wait(0.1):
            pass
        trial.kill()
        trial.join()
        return trial.exitcode == 0


def _uncopied(path: Path, job: Job, error: OSError) -> str:
    return (
        f"{path} cannot be copied to {job.folder}: {error.strerror}. Set TMPDIR to a folder with"
        " enough space"
    )


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from one that replaces it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
