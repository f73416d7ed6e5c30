"""Many small parts into few large ones, while others read, and whatever kills it.

A merged part names in its footer the parts that it replaces, and every reader leaves those out
(`parts.find_parts`). So the merged part's rename is the one moment in which the new takes the place
of the old; what was replaced is removed after it, by this run or by the next. Until then a kill
costs disk space and nothing else. A reader whose part vanished looks again.

    small parts --merged, written, fsynced, renamed, read back--> merged part + hidden small parts
                                                                   --removed--> merged part
"""

import json
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from avflow.orchestrator.errors import StoreError
from avflow.orchestrator.parts import (
    REPLACES,
    all_parts,
    find_parts,
    list_parts,
    serialise,
    write_atomically,
)
from avflow.orchestrator.paths import TABLES, RunPaths

MANY_PARTS = 200  # a sweep that ends with more merges them
ROWS_A_PART = 500_000  # bounds the memory, too: 0.2 GB of cells
SOURCES_A_PART = 1_000  # their names stand in the footer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """Part files, before and after."""

    before: int
    after: int


def count_parts(paths: RunPaths) -> int:
    """Files of all tables."""
    return sum(len(list_parts(paths.table(table))) for table in TABLES)


def compact(paths: RunPaths, *, rows: int = ROWS_A_PART) -> Compacted:
    """Merge parts of one folder up to `rows` each. Call it with the run folder held.

    Raises StoreError when the disk refuses; every row is then still there.
    """
    before = count_parts(paths)
    try:
        for table in TABLES:
            for folder in sorted({path.parent for path in list_parts(paths.table(table))}):
                _compact_folder(folder, paths.temporary, rows)
    except OSError as error:
        raise StoreError(f"{paths.root}: parts can't be merged: {error}") from error
    done = Compacted(before=before, after=count_parts(paths))
    logger.info("compacted %d parts into %d", done.before, done.after)
    return done


def _compact_folder(folder: Path, temporary: Path, rows: int) -> None:
    _remove_replaced(folder)
    while groups := list(_groups(find_parts(folder), rows)):
        for group in groups:
            _merge(group, temporary)


def _remove_replaced(folder: Path) -> None:
    """Finish what an earlier run had begun, so that no part ever hides what hides another."""
    held = all_parts(folder)
    replaced = {name for part in held for name in part.replaces}
    for part in held:
        if part.path.name in replaced:
            part.path.unlink(missing_ok=True)


def _groups(parts: Sequence[Path], rows: int) -> Iterator[list[Path]]:
    """Neighbours by name that fit into one part and have the same columns; two at least."""
    group: list[Path] = []
    held, schema = 0, None
    for path in parts:
        with pq.ParquetFile(path) as found:
            n, columns = found.metadata.num_rows, found.schema_arrow.remove_metadata()
        fits = held + n <= rows and len(group) < SOURCES_A_PART and columns == schema
        if group and not fits:
            if len(group) > 1:
                yield group
            group, held = [], 0
        group.append(path)
        held, schema = held + n, columns
    if len(group) > 1:
        yield group


def _merge(sources: Sequence[Path], temporary: Path) -> None:
    tables = [_read(path) for path in sources]
    table = pa.concat_tables(tables)
    kept = {
        key: value
        for key, value in (tables[0].schema.metadata or {}).items()
        if key in (b"avflow.schema_version", b"avflow.writer")
    }
    kept[REPLACES] = json.dumps([path.name for path in sources]).encode()
    at, by = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"), secrets.token_hex(4)
    merged = sources[0].with_name(f"part-{at}-{by}-merged.parquet")
    write_atomically(merged, serialise(table.replace_schema_metadata(kept)), temporary)
    if not _read(merged).equals(table):
        merged.unlink()
        raise StoreError(f"{merged}: does not read back as it was written; nothing was removed")
    for path in sources:
        path.unlink()


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(
            path, partitioning=None, page_checksum_verification=True, use_threads=False
        )
    except pa.ArrowException as error:
        raise StoreError(f"{path}: can't be read, so it is not merged: {error}") from error
