"""Benchmarks from the Hugging Face hub: only the files that are read, resumed where it stopped.

`huggingface_hub` does the work (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and its other variables
hold); here is what to fetch, whether it fits on the disk, and unpacking.
"""

import fnmatch
import json
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from avflow.orchestrator.errors import AvflowError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

RECORD = "fetched.json"


class FetchError(AvflowError):
    """A download stopped on the way. What has arrived is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A repository of data sets; `files` are the patterns that are read, no others are fetched.

    `archives`: pattern of .zip files -> the folder that their members are unpacked into, flat.
    """

    repository: str
    files: tuple[str, ...]
    archives: Mapping[str, str]


SOURCES: Mapping[str, Source] = {
    "av_speakerbench": Source(
        repository="plnguyen2908/AV-SpeakerBench",
        files=(
            "test.csv",
            "test.tsv",
            "data/test-*.parquet",
            "audiovisual/*",
            "audiovisual_chunk_*.zip",
        ),
        archives={"audiovisual_chunk_*.zip": "audiovisual"},
    ),
    "worldsense": Source(
        repository="honglyhly/WorldSense",
        files=("worldsense_qa.json", "worldsense_videos*.zip"),
        archives={"worldsense_videos*.zip": "videos"},
    ),
    "av_odyssey": Source(
        repository="AV-Odyssey/AV_Odyssey_Bench", files=("av_odyssey_part*.parquet",), archives={}
    ),
}
"""By reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What lies in the folder now, as its record says: `files` are name -> bytes."""

    repository: str
    revision: str
    commit: str
    files: dict[str, int]


def fetch(name: str, folder: Path, *, revision: str, say: Callable[[str], None]) -> Fetched:
    """Bring a benchmark into `folder`; what is there already is not fetched or unpacked again.

    Raises ConfigError before anything is fetched (unknown name, no network, no such revision, no
    room) and FetchError when it stops on the way.
    """
    if name not in SOURCES:
        raise ConfigError(f"{name!r} can't be fetched; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    if (held := _offline(source, folder, revision)) is not None:
        return held
    commit, files = _wanted(source, folder, revision)
    sizes = {file.filename: file.file_size or 0 for file in files}
    missing = sum(sizes[file.filename] for file in files if file.will_download)
    if missing:
        archives = sum(sizes[path.name] for path, _ in _archives(source, folder, sizes))
        _check_room(folder, missing + archives)
        say(f"{source.repository} at {commit}: {missing / 1e9:.2f} GB to fetch into {folder}")
        _download(source, folder, commit)
    done = Fetched(repository=source.repository, revision=revision, commit=commit, files=sizes)
    members: Members = {}
    for archive, target in _archives(source, folder, sizes):
        say(f"{archive.name}: {unpack(archive, target, members):,} files unpacked into {target}")
    (folder / RECORD).write_text(json.dumps(asdict(done), indent=2) + "\n")
    return done


def _wanted(source: Source, folder: Path, revision: str) -> tuple[str, "list[DryRunFileInfo]"]:
    """The commit that the revision stands for, and the files of it that are read."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        commit = HfApi().dataset_info(source.repository, revision=revision).sha
        files = snapshot_download(
            source.repository,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            allow_patterns=list(source.files),
            dry_run=True,
        )
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{source.repository} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:  # a gated one, too
        raise ConfigError(
            f"{source.repository} is not there, or asks for a login: accept its terms on its page "
            "and set HF_TOKEN"
        ) from None
    except Exception as error:
        if not _is_network(error):
            raise
        raise ConfigError(
            f"the hub can't be reached for {source.repository} ({_told(error)}); on a machine "
            "without internet, run this on another and copy the folder"
        ) from None
    assert commit is not None
    assert isinstance(files, list)
    if not files:
        raise ConfigError(
            f"{source.repository} at {revision} holds none of {', '.join(source.files)}; another "
            "revision may (--revision)"
        )
    return commit, files


def _offline(source: Source, folder: Path, revision: str) -> Fetched | None:
    """None when the hub may be asked; else what lies in the folder, whole, or a ConfigError."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        return None
    record = folder / RECORD
    if record.is_file():
        held = Fetched(**json.loads(record.read_text()))
        whole = all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in held.files.items()
        )
        if whole and (held.repository, held.revision) == (source.repository, revision):
            return held
    raise ConfigError(
        f"HF_HUB_OFFLINE is set, and {folder} does not hold all of {source.repository} at "
        f"{revision}; fetch it on a machine with internet and copy the folder"
    )


def _is_network(error: Exception) -> bool:
    """Errors of sockets, and of whichever HTTP library the hub's own goes through."""
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")


def _told(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_room(folder: Path, n_bytes: int) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise ConfigError(
            f"{n_bytes / 1e9:.1f} GB are to be fetched and unpacked, but {there} has "
            f"{free / 1e9:.1f} GB free"
        )


def _download(source: Source, folder: Path, commit: str) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source.repository,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            allow_patterns=list(source.files),
        )
    except Exception as error:
        if not _is_network(error):
            raise
        raise FetchError(
            f"{source.repository}: the download stopped ({_told(error)}); the same command goes on "
            "from there"
        ) from None


def _archives(source: Source, folder: Path, names: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Archives among the files, and where their members go."""
    for pattern, target in source.archives.items():
        for name in sorted(fnmatch.filter(names, pattern)):
            yield folder / name, folder / target


Members = dict[Path, tuple[str, tuple[int, int]]]
"""File -> the archive's member that it is, with that one's size and checksum."""


def unpack(archive: Path, target: Path, members: Members) -> int:
    """Unpack a .zip's files into `target` by their bare names; the number that was not there yet.

    Bare names can't leave the folder. `members` are those of the archives before, to which its own
    are added. Raises FetchError for an archive that can't be read, two files of one name, and a
    full disk.
    """
    target.mkdir(parents=True, exist_ok=True)
    unpacked = 0
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = target / PurePosixPath(member.filename.replace("\\", "/")).name
                if member.is_dir() or path.name.startswith("."):
                    continue
                here, content = f"{archive.name}/{member.filename}", (member.file_size, member.CRC)
                before, same = members.setdefault(path, (here, content))
                if content != same:
                    raise FetchError(
                        f"{archive}: {before} and {here} would be one file; unpack it by hand"
                    )
                if path.is_file() and path.stat().st_size == member.file_size:
                    continue
                part = path.with_name(f"{path.name}.part")
                with opened.open(member) as packed, part.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                part.replace(path)
                unpacked += 1
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise FetchError(f"{archive}: damaged ({error}); delete it and fetch again") from error
    except OSError as error:
        raise FetchError(
            f"{archive}: unpacking stopped ({error}); the same command goes on from there"
        ) from error
    except RuntimeError as error:  # a password, or a compression that Python does not know
        raise FetchError(f"{archive}: {error}; unpack it by hand into {target}") from error
    return unpacked
