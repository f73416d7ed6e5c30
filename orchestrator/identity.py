"""What makes two sweeps the same: every config field is `Identity` or `RunTime`, stated beside it.

Identity can change a number or which rows exist; run time is where, how fast and how often
(paths, workers, retries, `limit`). What a path points to enters by its digest instead, so that a
folder may move. A test fails until a new field is classified; bump IDENTITY_VERSION with it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, TypeVar

from pydantic import BaseModel

IDENTITY_VERSION = 3
"""Of the fields that make up a job's id, and of how media are decoded. Counted up whenever an id,
or a number under it, would otherwise change."""

METRIC_VERSION = 1
"""Of the measurement: float32 head, softmax over the vocabulary, last position, base token."""


class Role(Enum):
    """The class of a config field."""

    IDENTITY = "identity"
    RUN_TIME = "run time"


T = TypeVar("T")
Identity = Annotated[T, Role.IDENTITY]
RunTime = Annotated[T, Role.RUN_TIME]


def canonical_json(value: object) -> str:
    """One spelling a value: sorted keys, no spaces, ASCII. Raises TypeError for other types."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """blake2b-128 of the canonical JSON, 32 hexadecimal digits."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def role(model: type[BaseModel], field: str) -> Role:
    """Raises TypeError for a field that nobody has classified."""
    roles = [mark for mark in model.model_fields[field].metadata if isinstance(mark, Role)]
    if len(roles) != 1:
        raise TypeError(f"{model.__name__}.{field} must be marked Identity or RunTime, once")
    return roles[0]


def identity_fields(config: BaseModel) -> dict[str, object]:
    """The identity fields of a config and of the configs inside it, as JSON values."""
    kind = type(config)
    return {
        name: _identity_value(getattr(config, name))
        for name in kind.model_fields
        if role(kind, name) is Role.IDENTITY
    }


def _identity_value(value: object) -> object:
    if isinstance(value, BaseModel):
        return identity_fields(value)
    if isinstance(value, tuple | list):
        return [_identity_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _identity_value(item) for key, item in value.items()}
    return value


def differences(mine: object, theirs: object, at: str = "") -> Iterator[str]:
    """`path: mine here, theirs there` for each leaf in which two JSON values differ."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(set(mine) | set(theirs)):
            path = f"{at}.{key}" if at else str(key)
            yield from differences(mine.get(key), theirs.get(key), path)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(one, other, f"{at}[{index}]")
    elif mine != theirs:
        yield f"{at}: {_shown(mine)} here, {_shown(theirs)} there"


def _shown(value: object) -> str:
    text = "absent" if value is None else canonical_json(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
