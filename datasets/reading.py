"""What every reader of a benchmark needs: rows of annotation files, and names for what is wrong.

A file that can't be used at all raises AnnotationError. A single row that can't becomes a
`LeftOut`, named and counted, and the rest is read on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

Row = Mapping[str, object]


class AnnotationError(ValueError):
    """Annotations can't be used: which file, what is wrong, what to do."""


class RowError(ValueError):
    """One row can't be used: which field, what is wrong. Its reader makes a LeftOut of it."""


class DoubledField(ValueError):
    """A field that an object of JSON has twice: its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A question that can't be asked. `place` is the file and the row (from 1, as `file, row 7`),
    `reason` names the field."""

    place: str
    task: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def each_once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, as an `object_pairs_hook`: of a field that is there twice, `json` would
    take the last and say nothing. Raises DoubledField."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise DoubledField(next(name for name in names if names.count(name) > 1))
    return fields


def place(path: Path, row: int) -> str:
    """`test.csv, row 7`: the first row below the header is 1."""
    return f"{path}, row {row}"


def find_file(root: Path, names: Sequence[str], what: str) -> list[Path]:
    """The files of the first pattern that is there, sorted. Raises AnnotationError."""
    for name in names:
        found = sorted(path for path in root.glob(name) if path.is_file())
        if found:
            return found
    wanted = ", ".join(names)
    raise AnnotationError(f"{root}: no annotations of {what} in it; looked for {wanted}")


def column_names(path: Path) -> tuple[str, ...]:
    """Of a .parquet. Raises AnnotationError when it can't be read."""
    try:
        return tuple(pyarrow.parquet.read_schema(path).names)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error


def table_rows(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, Row]]:
    """Rows of a .csv, .tsv or .parquet with their numbers (from 1); other columns are not read.

    Values of text files are strings (empty, not null). Raises AnnotationError for a missing column
    or a file that can't be parsed.
    """
    try:
        yield from _rows(path, required, optional)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: pa.ArrowException) -> AnnotationError:
    return AnnotationError(f"{path}: can't be read ({error}); fetch it again")


def _rows(
    path: Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[int, Row]]:
    number = 0
    batches = (
        _parquet(path, required, optional)
        if path.suffix == ".parquet"
        else _text(path, required, optional)
    )
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _parquet(
    path: Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names, required, optional)
        yield from file.iter_batches(batch_size=256, columns=columns)


def _text(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[pa.RecordBatch]:
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
    )
    with pyarrow.csv.open_csv(path, parse_options=parse) as opened:
        columns = _columns(path, opened.schema.names, required, optional)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=False,
    )
    with pyarrow.csv.open_csv(path, parse_options=parse, convert_options=convert) as opened:
        yield from opened


def _columns(
    path: Path, present: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> list[str]:
    missing = [name for name in required if name not in present]
    if missing:
        raise AnnotationError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(present)}. Is this the "
            "benchmark's own file?"
        )
    return [*required, *(name for name in optional if name in present)]
