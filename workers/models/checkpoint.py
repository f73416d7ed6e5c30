"""Where a checkpoint lies and what identifies it. Reads no weights into memory."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from avflow.workers.models.base import ModelSpec, UnsupportedModelError

TESTBED = Path(__file__).with_name("testbed")
_DESCRIBING = (".json", ".jinja", ".txt")  # config, tokenizer and processor files
_WHOLE_BYTES = 64 << 20  # weight files up to here are hashed whole
_EDGE_BYTES = 1 << 20


def resolve_path(spec: ModelSpec) -> str:
    """A local folder's absolute path, or the hub id as it is.

    Raises UnsupportedModelError if a local path, or the shipped checkpoint, isn't there.
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
    return str(folder)


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~", os.sep))


def read_config(spec: ModelSpec) -> tuple[dict[str, Any], str]:
    """The checkpoint's config.json and its digest (sha256, hex).

    A folder's digest covers its config, tokenizer, processor and template files and its
    safetensors: whole files, or of large ones size and both ends. A hub checkpoint's covers config
    and commit.
    """
    path = resolve_path(spec)
    digest = hashlib.sha256()
    if os.path.isabs(path):
        for file in sorted(Path(path).iterdir()):
            if file.suffix in (*_DESCRIBING, ".safetensors"):
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                _hash_file(file, digest)
        config = Path(path, "config.json")
    else:
        config = _fetch_config(spec, path)
        # The cache keeps a file under snapshots/<commit>/: a branch's name would not identify it.
        digest.update(f"{path}\0{config.parent.name}\0".encode())
        _hash_file(config, digest)
    return json.loads(config.read_text(encoding="utf-8")), digest.hexdigest()


def _fetch_config(spec: ModelSpec, hub_id: str) -> Path:
    """config.json of a hub checkpoint, from the local cache where there is no network."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=spec.revision))
    except OSError as error:  # the hub's own errors are all of this class
        raise UnsupportedModelError(
            f"model {spec.name}: can't read config.json of {hub_id} from the hub or its cache "
            f"({type(error).__name__}); check the id, or give a local folder"
        ) from error


def _hash_file(path: Path, digest: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        if path.stat().st_size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(-_EDGE_BYTES, os.SEEK_END)
            digest.update(file.read())
