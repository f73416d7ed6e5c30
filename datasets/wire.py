"""What goes to the decoding process and back: a JSON header and bare arrays, never pickle.

The process that reads strangers' files is the one that a crafted file might take over; what it
says must not be able to run code in the process that asked.

    message: 4 bytes, the length of the header | header: JSON | the arrays' bytes, in its order
"""

import builtins
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from avflow.datasets.media_spec import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sample import MediaPart

_ARRAYS: Mapping[str, tuple[type[np.generic], int]] = {
    "frames": (np.uint8, 4),
    "waveform": (np.float32, 1),
}
_LENGTH = struct.Struct("<I")


class WireError(Exception):
    """What came is no message: whoever sent it can't be trusted any more."""


def send_request(to: IO[bytes], root: Path, part: MediaPart, spec: MediaSpec) -> None:
    """A file to decode."""
    _send(to, {"root": str(root), "part": asdict(part), "spec": asdict(spec)})


def receive_request(source: IO[bytes]) -> tuple[Path, MediaPart, MediaSpec]:
    """Raises EOFError when there are no more."""
    header = _header(source)
    return Path(header["root"]), MediaPart(**header["part"]), MediaSpec(**header["spec"])


def send_answer(to: IO[bytes], answer: DecodedMedia | Exception) -> None:
    """The file's arrays, or why there are none."""
    if isinstance(answer, Exception):
        _send(to, {"error": _spelled(answer)})
        return
    fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
    arrays = {name: fields.pop(name) for name in _ARRAYS}
    shapes = {name: None if array is None else array.shape for name, array in arrays.items()}
    _send(to, {"media": fields, "shapes": shapes})
    for name, (kind, _) in _ARRAYS.items():
        if arrays[name] is not None:
            to.write(np.ascontiguousarray(arrays[name], dtype=kind).data)


def receive_answer(source: IO[bytes]) -> DecodedMedia | Exception:
    """Raises EOFError when the other side has gone, WireError when it sent nonsense."""
    header = _header(source)
    try:
        if "error" in header:
            return _error(header["error"])
        shapes = header["shapes"]
        arrays: dict[str, Any] = {name: _array(source, name, shapes[name]) for name in _ARRAYS}
        fields = header["media"]
        for name in ("frame_times", "notes"):
            fields[name] = tuple(fields[name])
        return DecodedMedia(**fields, **arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"no answer of ours: {error}") from error


def _send(to: IO[bytes], header: Mapping[str, Any]) -> None:
    text = json.dumps(header).encode("ascii")
    to.write(_LENGTH.pack(len(text)) + text)


def _header(source: IO[bytes]) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    try:
        header = json.loads(_exactly(source, length))
    except ValueError as error:
        raise WireError("no message of ours") from error
    if not isinstance(header, dict):
        raise WireError("no message of ours")
    return header


def _array(source: IO[bytes], name: str, shape: list[int] | None) -> NDArray[Any] | None:
    if shape is None:
        return None
    kind, axes = _ARRAYS[name]
    if len(shape) != axes or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"{name} of shape {shape}")
    size = int(np.prod(shape, dtype=object)) * np.dtype(kind).itemsize
    return np.frombuffer(_exactly(source, size), dtype=kind).reshape(shape)


def _exactly(source: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)  # which numpy can also write to
    view = memoryview(data)
    while view:
        n = source.readinto(view)  # type: ignore[attr-defined]  # a pipe's; IO does not declare it
        if not n:
            raise EOFError
        view = view[n:]
    return data


def _spelled(error: Exception) -> dict[str, Any]:
    system = error if isinstance(error, OSError) and error.errno is not None else None
    return {
        "kind": type(error).__name__,
        "text": str(error) if system is None else str(system.strerror),
        "errno": None if system is None else system.errno,
        "file": str(system.filename) if system is not None and system.filename else None,
        "notes": list(getattr(error, "__notes__", ())),
    }


def _error(said: Mapping[str, Any]) -> Exception:
    """The exception, if it is ours or Python's own; else a RuntimeError that names it."""
    name, text = str(said["kind"]), str(said["text"])
    kind = MediaError if name == "MediaError" else getattr(builtins, name, None)
    error: Exception
    if said["errno"] is not None:
        where = () if said["file"] is None else (str(said["file"]),)
        error = OSError(int(said["errno"]), text, *where)  # Python picks the subclass
    elif isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(text)
        except TypeError:  # it takes more than a message, as UnicodeDecodeError does
            error = RuntimeError(f"{name}: {text}")
    else:
        error = RuntimeError(f"{name}: {text}")
    for note in said["notes"]:
        error.add_note(str(note))
    return error
