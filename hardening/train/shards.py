"""What lies in tar shards in WebDataset's layout: pictures by where they lie, and their labels.

Files of one sample share their name up to its first dot, as 0017.jpg, 0017.cls and 0017.json. A
shard is read in any order, so it is plain tar: where a picture begins is all that is kept of it.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rampart.hardening.train.listing import SPLIT, SUFFIXES, is_hidden

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as WebDataset writes its shards
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
LABELS = ("cls", "json")  # endings of what holds a label, the first that is there
NAMES = ("classnames.txt", "classes.txt")  # in the folder of the shards, or the one above
LONGEST = 2**20  # bytes of a label's file
Label = int | str  # the number of a class, or its name


class Member(NamedTuple):
    """A file in a tar shard."""

    shard: Path
    name: str
    start: int  # bytes before it
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def read(self) -> bytes:
        """Its content; less where the shard was cut since."""
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class Index(NamedTuple):
    """The labelled pictures of some shards in order; `bad` says what is wrong with other samples,
    `left_out` counts what is no picture, by reason.
    """

    members: list[Member]
    labels: list[Label]
    bad: list[str]
    left_out: Counter[str]


def is_sharded(path: Path) -> bool:
    """Whether that is a shard, a pattern as train-*.tar or train-{00..12}.tar, or a folder."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not is_hidden(entry.name)]
        return any(map(is_shard, entries)) and not any(entry.is_dir() for entry in entries)
    return is_shard(path)


def is_shard(path: Path) -> bool:
    """Whether a file is a shard by its name, or would be if it were unpacked."""
    return path.name.lower().endswith((".tar", *PACKED))


def shards_of(path: Path) -> list[Path]:
    """The shards in order. Raises FileNotFoundError or ValueError where they are none to read."""
    if path.is_dir():
        found = [entry for entry in path.iterdir() if is_shard(entry) and not is_hidden(entry.name)]
    else:
        named = list(map(Path, spelled_out(str(path))))
        each = ([one] if one.is_file() else one.parent.glob(one.name) for one in named)
        found = [shard for some in each for shard in some]
        if len(found) < len(named) or not all(shard.is_file() for shard in found):
            missing = next((one for one in named if not one.is_file()), path)
            raise FileNotFoundError(f"no shard at {missing}: check the path")
    if packed := sorted(file for file in found if file.name.lower().endswith(PACKED)):
        raise ValueError(
            f"{packed[0]} is compressed, but training reads shards in any order: unpack it to a"
            " plain .tar (pictures are compressed already)"
        )
    splits = {part for shard in found for part in split_in(shard)}
    if len(splits) > 1:
        inside = path if path.is_dir() else path.parent
        first, *_ = sorted(splits)
        raise ValueError(
            f"{path} holds shards of several splits ({', '.join(sorted(splits))}): pass those of"
            f" one, as '{inside}/*{first}*.tar'"
        )
    return sorted(found)


def spelled_out(address: str) -> Iterator[str]:
    """`a-{000..002}.tar` as its three addresses."""
    match = RANGE.search(address)
    if not match:
        yield address
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        text = f"{number:0{len(first)}d}"
        yield from spelled_out(address[: match.start()] + text + address[match.end() :])


def split_in(shard: Path) -> list[str]:
    """The splits that a shard's name speaks of, as train in imagenet-train-0001.tar."""
    words = re.split(r"[^a-z]+", shard.name.lower().removesuffix(".tar"))
    return [word for word in words if SPLIT.fullmatch(word)]


def list_samples(shards: Sequence[Path]) -> Index:
    """The pictures of `shards`, each with its label, by the heads in them; no picture is read."""
    found = Index([], [], [], Counter())
    for shard in tqdm(shards, "listing shards", leave=False):
        for key, files in samples(shard, found).items():
            pictures = [files[ending] for ending in files if f".{ending}" in SUFFIXES]
            if not pictures:
                found.left_out["samples without a picture"] += 1
                continue
            try:
                label = label_of(shard, key, files)
                if len(pictures) > 1:
                    raise ValueError(f"{shard}: {key} has {len(pictures)} pictures: keep one")
            except ValueError as error:
                found.bad.append(str(error))
                continue
            found.members.append(pictures[0])
            found.labels.append(label)
    return found


def samples(shard: Path, found: Index) -> dict[str, dict[str, Member]]:
    """The files of each sample of a shard, by their endings; what is wrong goes into `found`."""
    out: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as packed:
            for member in packed:
                packed.members = []  # type: ignore[attr-defined]  # or it remembers all of them
                home, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if not member.isfile() or is_hidden(name):
                    continue
                file = Member(shard, member.name, member.offset_data, member.size)
                out.setdefault(f"{home}/{key}" if home else key, {})[ending.lower()] = file
    except (OSError, tarfile.TarError) as error:
        whole = "is truncated" if out else "is not a tar file"
        found.bad.append(f"{shard} {whole} ({error}): copy it again")
    return out


def label_of(shard: Path, key: str, files: Mapping[str, Member]) -> Label:
    """The label of a sample. Raises ValueError that names the shard and the member."""
    there = [ending for ending in LABELS if ending in files]
    if not there:
        raise ValueError(f"{shard}: {key} has no label: add {key}.cls with the number of its class")
    file = files[there[0]]
    if file.size > LONGEST:
        raise ValueError(
            f"{file} has {file.size:,} bytes, too many for a label: put only the number of its"
            " class there"
        )
    try:
        text = file.read().decode()
        content = json.loads(text) if there[0] == "json" else text
    except ValueError as error:
        raise ValueError(f"{file} is not a label as text or JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("label", content.get("cls"))
    if isinstance(content, str) and content.strip():
        name = content.strip()
        return int(name) if name.isascii() and name.isdigit() else name
    if isinstance(content, int) and not isinstance(content, bool) and content >= 0:
        return content
    raise ValueError(f"{file} holds no label: expected the number or the name of a class")


def class_names(shards: Sequence[Path], labels: Sequence[Label], most: int) -> tuple[str, ...]:
    """The classes: those that a file beside the shards lists, one a line, else those of `labels`.

    Raises ValueError for numbers beside names, and for more than `most` numbers.
    """
    for file in names_beside(shards):
        lines = [line.strip() for line in file.read_text().splitlines()]
        return tuple(line for line in lines if line)
    numbers = [label for label in labels if isinstance(label, int)]
    names = sorted({label for label in labels if isinstance(label, str)})
    if numbers and names:
        raise ValueError(
            f"{shards[0].parent}: some labels are numbers ({numbers[0]}), others are names"
            f" ({names[0]}): use only one kind"
        )
    highest = max(numbers, default=-1)
    if highest >= most:
        raise ValueError(
            f"{shards[0].parent}: a label is {highest}, so there would be that many classes: number"
            f" classes from 0 without gaps, or list their names in {NAMES[0]}"
        )
    return tuple(names or map(str, range(highest + 1)))


def names_beside(shards: Sequence[Path]) -> Iterator[Path]:
    """The files that list classes, the nearest first."""
    home = shards[0].absolute().parent
    each = (folder / name for folder in (home, home.parent) for name in NAMES)
    return (file for file in each if file.is_file())


def numbered(found: Index, classes: Sequence[str]) -> Index:
    """`found` with the numbers of `classes` for labels; others are bad."""
    places = {name: place for place, name in enumerate(classes)}
    out = Index([], [], list(found.bad), found.left_out)
    for member, label in zip(found.members, found.labels, strict=True):
        place = places.get(label, -1) if isinstance(label, str) else label
        if 0 <= place < len(classes):
            out.members.append(member)
            out.labels.append(place)
        else:
            out.bad.append(
                f"{member} has the label {label}, none of the {len(classes)} classes: correct it,"
                f" or list its class in {NAMES[0]}"
            )
    return out


def size_of(file: Path | Member) -> int:
    """Bytes of a picture's file. Raises OSError where it is gone."""
    return file.size if isinstance(file, Member) else file.stat().st_size
