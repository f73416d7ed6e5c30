"""Merged parts: every row once, whatever dies when, and for readers as if nothing happened."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal
from stored_run import failure, make_plan, write_unit
from typer.testing import CliRunner

from avflow.orchestrator import compact as compact_module
from avflow.orchestrator import sweep
from avflow.orchestrator.cli import app
from avflow.orchestrator.compact import compact, count_parts
from avflow.orchestrator.errors import RunLocked, StoreError
from avflow.orchestrator.lock import hold
from avflow.orchestrator.parts import all_parts, find_parts
from avflow.orchestrator.paths import TABLES, RunPaths
from avflow.orchestrator.results import read, status
from avflow.orchestrator.run_folder import claim
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import stored_state

HARNESS = Path(__file__).with_name("compact_harness.py")
PLANNED = 6


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of many parts: each unit its own, a failure in each, some units stored twice."""
    paths, plan = RunPaths(tmp_path / "run"), make_plan(PLANNED)
    claim(paths, plan)
    for writer in ("0000000a", "0000000b"):
        store = ResultStore(paths, plan, writer_id=writer)
        for unit in plan.units[: PLANNED if writer.endswith("a") else 3]:
            write_unit(store, unit)
            store.add_failure(failure(unit, unit.curves[0].key, terminal=False), worker="host:1")
            store.commit()
    return paths


def tables(paths: RunPaths) -> dict[str, pl.DataFrame]:
    """What a reader finds, without the order."""
    found = {}
    for name in TABLES:
        frame = read(paths.root, name)
        plain = [n for n, kind in frame.schema.items() if not kind.is_nested()]
        found[name] = frame.sort(plain)
    return found


def assert_same(found: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame]) -> None:
    for name in TABLES:
        assert_frame_equal(found[name], expected[name])


def test_few_parts_hold_what_many_held(paths: RunPaths) -> None:
    before, state = tables(paths), stored_state(paths)
    assert before["failures"].height == PLANNED + 3, "a failure is an event: none is a double"
    done = compact(paths)
    assert (done.before, done.after) == (27, 3), "one a table that holds anything"
    assert_same(tables(paths), before)
    assert stored_state(paths) == state
    assert compact(paths).before == 3, "there is nothing left to merge"


def test_parts_stay_below_the_size_asked_for(paths: RunPaths) -> None:
    before = tables(paths)
    compact(paths, rows=20)  # a unit's cells are 8
    assert [p.name.endswith("merged.parquet") for p in find_parts(paths.table("cells"))].count(
        True
    ) == 4
    assert_same(tables(paths), before)


def test_a_kill_at_any_moment_loses_and_doubles_nothing(paths: RunPaths, tmp_path: Path) -> None:
    before, state = tables(paths), stored_state(paths)
    copies = tmp_path / "copies"
    said = subprocess.run(
        [sys.executable, HARNESS, paths.root, copies, "40"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    deaths = int(said.stdout)
    assert deaths > 27 + 3 * 3, "each removal, and the moments of each write"
    hidden = 0
    for number in range(1, deaths + 2, 2):
        copy = RunPaths(copies / str(number))
        left = sum(len(all_parts(copy.table(t))) - len(find_parts(copy.table(t))) for t in TABLES)
        hidden += left > 0
        assert_same(tables(copy), before)
        assert stored_state(copy) == state
    assert hidden > 5, "kills between a rename and the last removal"
    for number in (deaths // 3, 2 * deaths // 3, deaths):
        copy = RunPaths(copies / str(number))
        compact(copy)
        assert count_parts(copy) == 3
        assert_same(tables(copy), before)


def test_readers_see_every_row_all_the_time(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights = {name: frame.height for name, frame in tables(paths).items()}
    looked, stop, wrong = 0, threading.Event(), []

    def look() -> None:
        nonlocal looked
        while not stop.is_set():
            found = {name: read(paths.root, name).height for name in TABLES}
            wrong.extend([found] if found != heights else [])
            wrong.extend(["status"] if status(paths.root).samples_done != PLANNED else [])
            looked += 1

    real = compact_module._merge
    reader = threading.Thread(target=look)

    def slowly(*args: Any) -> None:
        seen = looked
        real(*args)
        while looked == seen and reader.is_alive():
            pass

    monkeypatch.setattr(compact_module, "_merge", slowly)
    reader.start()
    compact(paths, rows=20)
    compact(paths, rows=60)
    compact(paths)
    stop.set()
    reader.join()
    assert not wrong
    assert looked > 3


def test_a_reader_whose_part_vanishes_looks_again(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tables(paths)["cells"].height
    real, merged = pl.scan_parquet, []

    def scan(*args: Any, **kwargs: Any) -> pl.LazyFrame:
        frame = real(*args, **kwargs)
        if not merged:
            merged.append(compact(paths))  # between the listing and the reading
        return frame

    monkeypatch.setattr(pl, "scan_parquet", scan)
    assert read(paths.root).height == expected


def test_what_does_not_read_back_replaces_nothing(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tables(paths)
    real = compact_module.serialise

    def forgetful(table: pa.Table) -> memoryview:
        return real(table.slice(1))

    monkeypatch.setattr(compact_module, "serialise", forgetful)
    with pytest.raises(StoreError, match="does not read back"):
        compact(paths)
    assert_same(tables(paths), before)


def test_a_sweep_ends_with_few_parts(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep._tidy(paths)
    assert count_parts(paths) == 27, "that many are few"
    monkeypatch.setattr(sweep, "MANY_PARTS", 26)
    sweep._tidy(paths)
    assert count_parts(paths) == 3


def test_the_command_says_what_it_did_and_refuses_what_a_driver_writes_to(
    paths: RunPaths, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(app, ["compact", str(paths.root)])
    assert (ran.exit_code, ran.output) == (0, "27 part files are now 3\n")
    with hold(paths):
        ran = CliRunner().invoke(app, ["compact", str(paths.root)])
    assert isinstance(ran.exception, RunLocked)
    ran = CliRunner().invoke(app, ["compact", str(tmp_path / "nothing")])
    assert isinstance(ran.exception, StoreError)
    assert not (tmp_path / "nothing").exists()
