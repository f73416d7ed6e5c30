"""Where a data set's files may lie: below its root, and nowhere else."""

import os
from pathlib import Path, PurePosixPath

from avflow.datasets.media_spec import MediaError


def inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`, whether it exists or not.

    Annotation files come from strangers, so a name may lead nowhere else: not with `..`, not as
    an absolute path, not through a link. The one exception is the Hugging Face cache, whose
    snapshots are links to the `blobs` beside them. Raises MediaError.
    """
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise MediaError(f"{name!r} is no file's name")  # tables could not hold it either
    relative = PurePosixPath(os.path.normpath(name))
    if relative.is_absolute() or relative.parts[:1] in ((), ("..",)):
        raise MediaError(
            f"{name!r} leaves the data set's root {root}; paths of media are relative to it"
        )
    path = root / relative
    try:
        real, real_root = path.resolve(), root.resolve()
    except RuntimeError as error:
        raise MediaError(f"{path} is a link that leads to itself; put the file there") from error
    allowed = [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parents[1] / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise MediaError(
            f"{path} is a link out of the data set's root {root}, to {real}; put the file itself "
            "there, or make the root a folder that holds both"
        )
    return path
