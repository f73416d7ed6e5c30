"""Where a checkpoint lies, which of its files are loaded, and what identifies it.

Reads no weights into memory. Of a checkpoint that holds more than the model that is run (a speech
generator beside it), the files of the rest are neither needed nor read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avflow.workers.models.base import ModelSpec, NotNowError, UnsupportedModelError
from avflow.workers.models.prompt_files import Needed, refuse_missing

TESTBED = Path(__file__).with_name("testbed")
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DESCRIBING = (".json", ".jinja", ".txt", ".model")  # config, tokenizer and processor files
_WHOLE_BYTES = 64 << 20  # weight files up to here are hashed whole
_EDGE_BYTES = 1 << 20
_HEADER_BYTES = 100 << 20  # more than any safetensors header may have


def resolve_path(spec: ModelSpec) -> str:
    """A local folder's absolute path, or the hub id as it is.

    Raises UnsupportedModelError if a local path, or the shipped checkpoint, isn't there, or is
    given a revision.
    """
    if spec.path == "testbed":
        folder = TESTBED
    elif Path(spec.path).expanduser().is_dir():
        folder = Path(spec.path).expanduser().resolve()
    elif _is_hub_id(spec.path):
        return spec.path
    else:
        raise UnsupportedModelError(
            f"model {spec.name}: no folder {spec.path!r}; give a local folder, a hub id "
            "(owner/name) or 'testbed'"
        )
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"model {spec.name}: {folder} holds no config.json, so it is not a checkpoint in "
            "Hugging Face's layout"
        )
    if spec.revision is not None:
        raise UnsupportedModelError(
            f"model {spec.name}: revision {spec.revision!r} is for hub ids, {folder} is a local "
            "folder; remove `revision` or give the hub id"
        )
    return str(folder)


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~", os.sep))


def read_config(
    spec: ModelSpec, unused: Sequence[str] = (), needed: Sequence[Needed] = ()
) -> tuple[dict[str, Any], str]:
    """The checkpoint's config.json and its digest (sha256, hex). Checks that its files are there.

    `unused`: prefixes of the tensors that are not loaded; `needed`: what there must be beside the
    weights. A folder's digest covers its config, tokenizer, processor and template files and the
    weight files that are loaded: whole, or of large ones size and both ends. A hub checkpoint's
    covers config and commit.
    Raises UnsupportedModelError for a wrong revision, a broken config.json, and for files that
    are missing or weight files that are cut short or no safetensors, all by name.
    """
    path = resolve_path(spec)
    digest = hashlib.sha256()
    if os.path.isabs(path):
        folder = Path(path)
        weights = weight_files(spec, folder, unused)
        refuse_missing(spec, path, os.listdir(folder), needed)
        for file in sorted(folder.iterdir()):
            if file.suffix in _DESCRIBING or file.name in weights:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                _hash_file(file, digest)
    else:
        folder = _fetch_config(spec, path).parent
        _check_published(spec, path, folder, unused, needed)
        # The cache keeps a file under snapshots/<commit>/: a branch's name would not identify it.
        digest.update(f"{path}\0{folder.name}\0".encode())
        _hash_file(folder / "config.json", digest)
    return _json(spec, folder / "config.json"), digest.hexdigest()


def model_type(spec: ModelSpec) -> str:
    """What the checkpoint's config.json calls itself. Raises UnsupportedModelError."""
    path = resolve_path(spec)
    folder = Path(path) if os.path.isabs(path) else _fetch_config(spec, path).parent
    return str(_json(spec, folder / "config.json").get("model_type"))


def describing_folder(spec: ModelSpec) -> Path:
    """A folder that holds the checkpoint's config, tokenizer and processor files; of a hub
    checkpoint no weights are fetched. Raises UnsupportedModelError as `read_config` does."""
    path = resolve_path(spec)
    return Path(path) if os.path.isabs(path) else _fetch_describing(spec, path)


@contextmanager
def local_folder(spec: ModelSpec, unused: Sequence[str] = ()) -> Iterator[Path]:
    """A folder for `from_pretrained` that names no file which holds `unused` tensors alone.

    A hub checkpoint is downloaded first, at the commit that `read_config` saw, without those
    files. Raises UnsupportedModelError as `read_config` does.
    """
    path = resolve_path(spec)
    folder = Path(path) if os.path.isabs(path) else _download(spec, path, unused)
    weights = weight_files(spec, folder, unused)
    if not (folder / INDEX).is_file():
        yield folder
        return
    index = _json(spec, folder / INDEX)
    kept = {key: file for key, file in index["weight_map"].items() if file in weights}
    if len(kept) == len(index["weight_map"]):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="avflow-") as view:
        for file in folder.iterdir():
            if file.suffix in _DESCRIBING or file.name in weights:
                Path(view, file.name).symlink_to(file.resolve())
        Path(view, INDEX).unlink()
        Path(view, INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        yield Path(view)


def weight_files(spec: ModelSpec, folder: Path, unused: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the safetensors files that hold what is loaded, found whole. Reads their headers.

    Raises UnsupportedModelError, naming every file that is missing or broken.
    """
    names = _weight_names(spec, folder, unused)
    wrong = [fault for name in names if (fault := _fault(folder / name)) is not None]
    if wrong:
        raise UnsupportedModelError(
            f"model {spec.name}: {len(wrong)} of {len(names)} weight files in {folder} can't be "
            f"used: {'; '.join(wrong)}; fetch them again"
        )
    return names


def _weight_names(spec: ModelSpec, folder: Path, unused: Sequence[str]) -> tuple[str, ...]:
    if not (folder / INDEX).is_file():
        return (_SINGLE,)
    index = _json(spec, folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise UnsupportedModelError(f"model {spec.name}: {folder / INDEX} has no weight_map")
    used = {str(file) for key, file in index.items() if not key.startswith(tuple(unused))}
    if outside := sorted(file for file in used if Path(file).name != file):
        raise UnsupportedModelError(
            f"model {spec.name}: {folder / INDEX} names files outside of its folder: {outside[:3]}"
        )
    return tuple(sorted(used))


def _fault(file: Path) -> str | None:
    """What is wrong with a safetensors file, told by its header; None if nothing is."""
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size, _HEADER_BYTES):
                return f"{file.name} is no safetensors file, or was cut short"
            header = json.loads(opened.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file.name} is no safetensors file"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"{file.name} has {size} bytes of {whole}"


def _json(spec: ModelSpec, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"model {spec.name}: {file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UnsupportedModelError(f"model {spec.name}: {file} holds no JSON object")
    return found


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def _fetch_config(spec: ModelSpec, hub_id: str) -> Path:
    """config.json of a hub checkpoint, from the local cache where there is no network."""
    from huggingface_hub import hf_hub_download

    with _asking(spec, hub_id):
        return Path(hf_hub_download(hub_id, "config.json", revision=spec.revision))


def _check_published(
    spec: ModelSpec, hub_id: str, folder: Path, unused: Sequence[str], needed: Sequence[Needed]
) -> None:
    """That the hub lists all files, or, without a network, that the cache holds them."""
    from huggingface_hub import HfApi, hf_hub_download

    where = f"{hub_id} at {folder.name}"
    if _is_offline():
        weight_files(spec, folder, unused)
        refuse_missing(spec, f"the local cache of {where}", os.listdir(folder), needed)
        return
    try:
        with _asking(spec, hub_id):
            listed = HfApi().list_repo_files(hub_id, revision=folder.name)
            if INDEX in listed:
                hf_hub_download(hub_id, INDEX, revision=folder.name)
    except NotNowError:
        if any(_fault(folder / name) for name in _weight_names(spec, folder, unused)):
            raise
        return  # all of it was fetched before
    if missing := sorted(set(_weight_names(spec, folder, unused)) - set(listed)):
        raise UnsupportedModelError(
            f"model {spec.name}: {where} has no {', '.join(missing)}; only safetensors are loaded"
        )
    refuse_missing(spec, where, listed, needed)


def _fetch_describing(spec: ModelSpec, hub_id: str) -> Path:
    """The snapshot's folder with all but weights in it; offline, with what is there of it."""
    from huggingface_hub import snapshot_download

    folder = _fetch_config(spec, hub_id).parent
    if not _is_offline():
        describing = [f"*{suffix}" for suffix in _DESCRIBING]
        with _asking(spec, hub_id):
            snapshot_download(hub_id, revision=folder.name, allow_patterns=describing)
    return folder


def _download(spec: ModelSpec, hub_id: str, unused: Sequence[str]) -> Path:
    """The snapshot's folder with all that is loaded in it; offline, with what is there of it."""
    from huggingface_hub import snapshot_download

    folder = _fetch_describing(spec, hub_id)
    if not _is_offline():
        weights = list(_weight_names(spec, folder, unused))
        with _asking(spec, hub_id):
            snapshot_download(hub_id, revision=folder.name, allow_patterns=weights)
    return folder


@contextmanager
def _asking(spec: ModelSpec, hub_id: str) -> Iterator[None]:
    """The hub's errors in our words: told apart are those that another try may cure."""
    from huggingface_hub import errors

    what = f"model {spec.name}: {hub_id}" + (f" at {spec.revision!r}" if spec.revision else "")
    refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
               errors.RemoteEntryNotFoundError, errors.HFValidationError)  # fmt: skip
    try:
        yield
    except refused as error:
        raise UnsupportedModelError(
            f"{what}: the hub has no such id, revision or config.json ({type(error).__name__}); "
            "check them, or give a local folder"
        ) from error
    except UnsupportedModelError:
        raise
    except Exception as error:  # the hub library's own and its HTTP client's: no common class
        if _is_offline():
            raise UnsupportedModelError(
                f"{what} is not in the local cache, and HF_HUB_OFFLINE forbids to download it; "
                "check the revision, or give a local folder"
            ) from error
        raise NotNowError(
            f"{what}: neither the hub nor the local cache gives it ({type(error).__name__}); "
            "check the network, or give a local folder"
        ) from error


def _hash_file(path: Path, digest: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        if path.stat().st_size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(-_EDGE_BYTES, os.SEEK_END)
            digest.update(file.read())
