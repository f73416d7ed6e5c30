"""Options and answers as the benchmarks' authors write them."""

import ast
import re
from collections.abc import Sequence

from avflow.datasets.reading import Row, RowError
from avflow.datasets.sample import LETTERS

_PREFIX = re.compile(r"\s*\(?([A-J])\)?\s*[.:)]\s*")


def options_of(row: Row, field: str, counts: Sequence[int] = (4,)) -> tuple[str, ...]:
    """The options without the letters before them, from a list or the text of a Python list.

    Raises RowError: no list of strings, another number of options than `counts`, an empty one, or
    letters that are not A, B, C ... in this order.
    """
    value = row[field]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(f"{field} is {_short(value)}, which is no Python list") from None
    if not isinstance(value, list | tuple) or not all(map(_is_text, value)):
        raise RowError(f"{field} is {_short(value)}, which is no list of texts")
    if len(value) not in counts:
        wanted = " or ".join(map(str, counts))
        raise RowError(f"{field} holds {len(value)} options, not {wanted}: {_short(value)}")
    options = _without_letters(field, value)
    if not all(options):
        raise RowError(f"{field} holds an empty option: {_short(value)}")
    return options


def _without_letters(field: str, options: Sequence[str]) -> tuple[str, ...]:
    if lettered(options):
        return tuple(_PREFIX.sub("", option, count=1).strip() for option in options)
    if any(map(_PREFIX.match, options)):
        raise RowError(f"{field} holds options that are not lettered A, B, ...: {_short(options)}")
    return tuple(option.strip() for option in options)


def answer_of(row: Row, field: str, n_options: int) -> int:
    """The number of the right option, from 0. Raises RowError for a letter of none."""
    text = str(row[field] or "").strip().upper()
    known = LETTERS[:n_options]
    if len(text) != 1 or text not in known:
        raise RowError(f"{field} is {_short(row[field])}, which is none of its options, {known}")
    return known.index(text)


def text_of(row: Row, field: str) -> str:
    """A text, or a whole number as one, that may not be missing. Raises RowError."""
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{field} is {_short(value)}, and a text is needed")
    return value.strip()


def _is_text(value: object) -> bool:
    """Also no half of a character, which can't be written anywhere."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def lettered(options: Sequence[str]) -> bool:
    """Whether the options begin with their letters ("A. red", "B. blue")."""
    found = [_PREFIX.match(option) for option in options]
    return [match[1] if match else None for match in found] == list(LETTERS[: len(options)])
