"""Where a medium's bytes are: in a file of its own, or in a cell of a Parquet file.

AV-Odyssey ships its media inside its tables. They stay there: a cell's bytes are held in memory
while they are decoded, under a path that decoders can open, and vanish with it.

    images/cat.png                        a file below the root
    av_odyssey_part1.parquet#image_2/16   column image_2 of the 17th row
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from avflow.datasets.media_spec import MediaError
from avflow.datasets.roots import inside

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_CELL = re.compile(r"(?P<file>.+\.parquet)#(?P<column>[^/#]+)/(?P<row>\d+)")
_BUFFER_BYTES = 1 << 20
_COARSE_BYTES = 256 << 20


def cell_path(file: str, column: str, row: int) -> str:
    """How a MediaPart's `path` names a cell; rows count from 0."""
    return f"{file}#{column}/{row}"


@contextmanager
def opened(root: Path, path: str) -> Iterator[Path]:
    """A file that holds the medium, while the block lasts.

    Raises MediaError, which names the medium as the data set does: one that leaves the root, or a
    cell that is not there, is empty or can't be read. Whether a plain file exists is not asked.
    """
    cell = _CELL.fullmatch(path)
    if cell is None:
        yield inside(root, path)
        return
    content = _read_cell(inside(root, cell["file"]), cell["column"], int(cell["row"]))
    with _in_memory(content) as file:
        try:
            yield file
        except MediaError as error:
            raise MediaError(str(error).replace(str(file), str(root / path))) from error


def coarse_tables(root: Path, paths: Iterable[str]) -> Iterator[str]:
    """A warning for each table among these media whose row groups are too large to read one cell.

    A page of a column is read whole, and a group that was written at once may be a single page.
    Of a file that can't be read its samples say so, one by one.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    columns: dict[str, set[str]] = {}
    for cell in filter(None, map(_CELL.fullmatch, paths)):
        columns.setdefault(cell["file"], set()).add(cell["column"])
    for file, names in columns.items():
        try:
            groups = read_metadata(inside(root, file))
        except (OSError, ArrowException, MediaError):
            continue
        sizes = [
            column.total_uncompressed_size
            for group in map(groups.row_group, range(groups.num_row_groups))
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema.partition(".")[0] in names
        ]
        largest = max(sizes, default=0)
        if largest > _COARSE_BYTES:
            yield (
                f"{root / file}: media lie in row groups of up to {largest / 1e9:.2g} GB a column, "
                "and each may take that much memory, several times over, to read one; write the "
                "file anew with smaller groups (docs/datasets.md, Folders)"
            )


def _read_cell(file: Path, column: str, row: int) -> bytes:
    from pyarrow import ArrowException  # late: most data sets never need it
    from pyarrow.parquet import ParquetFile

    name = f"{file}, column {column}, row {row + 1}"
    try:
        with ParquetFile(file, buffer_size=_BUFFER_BYTES) as table:
            content = _cell(table, column, row)
    except FileNotFoundError:
        raise MediaError(
            f"{file}: no such file; check the data set's root and that it is complete"
        ) from None
    except (ArrowException, KeyError, IndexError) as error:
        raise MediaError(f"{name}: can't be read ({error}); fetch the file again") from error
    if not isinstance(content, bytes) or not content:
        raise MediaError(f"{name}: holds no media bytes; fetch the file again")
    return content


def _cell(table: "ParquetFile", column: str, row: int) -> object:
    """Reads the row's group up to the row, and of it one batch at a time."""
    in_struct = table.schema_arrow.field(column).type.num_fields > 0  # {bytes, path}
    leaf = f"{column}.bytes" if in_struct else column
    for group in range(table.metadata.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row < rows:
            batches = table.iter_batches(batch_size=1, row_groups=[group], columns=[leaf])
            for _ in range(row):
                next(batches)
            value = next(batches).column(0)[0].as_py()
            return value["bytes"] if isinstance(value, dict) else value
        row -= rows
    raise IndexError("the file has fewer rows")


@contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    if not hasattr(os, "memfd_create"):  # not Linux
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            yield Path(file.name)
        return
    descriptor = os.memfd_create("medium")
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield Path(f"/proc/self/fd/{descriptor}")
