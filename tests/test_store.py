"""The store: whole parts or none, rows once, and a resume that finds what is missing."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_run import curve_done, failure, fill, make_plan, sorted_cells, write_unit

from avflow.orchestrator import parts as parts_module
from avflow.orchestrator import store as store_module
from avflow.orchestrator.errors import RunLocked, StoreError
from avflow.orchestrator.paths import TABLES, RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.results import query, read
from avflow.orchestrator.run_folder import (
    claim,
    driver,
    hold,
)
from avflow.orchestrator.schema import KEYS, SCHEMAS
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def plan() -> Plan:
    return make_plan()


# -- what is written -------------------------------------------------------------------------


def test_a_run_reads_back_as_it_was_written(paths: RunPaths, plan: Plan) -> None:
    fill(paths, plan)
    cells = read(paths.root)
    assert cells.columns == SCHEMAS["cells"].names
    assert cells.height == plan.counts().cells == 4 * 2 * 4
    assert set(cells["job_id"]) == {job.job_id for job in plan.jobs()}
    done = curve_done(plan.units[0], plan.units[0].curves[0].key)
    mine = cells.filter(
        sample_id=plan.units[0].sample.sample_id, pathway=plan.units[0].curves[0].pathway.name
    ).sort("center_layer")
    assert mine["p_knockout"].to_list() == done.p_knockout.tolist()
    assert mine["delta"].to_list() == ((done.p_knockout - 0.5) / 0.5).tolist()
    assert mine["p_options"].to_list() == done.p_options.tolist()
    assert mine["correct_knockout"].to_list() == [True, False, True, False]
    assert mine["ordering"].null_count() == 4

    samples = read(paths.root, "samples")
    assert samples.columns == SCHEMAS["samples"].names
    assert samples["groups"][0].to_list()[0] == {
        "group": "video",
        "length": 9,
        "spans": [[3, 9], [12, 15]],
    }
    assert read(paths.root, "failures").is_empty()
    assert read(paths.root, "probes").columns == SCHEMAS["probes"].names


CONTRACT = """
job_id model dataset task category pathway variant window center_layer sample_id direction ordering
p_base p_knockout delta p_options base_token knockout_token correct_base correct_knockout n_tokens
n_blocked_edges
"""


def test_cells_are_the_contract_s_columns() -> None:
    assert SCHEMAS["cells"].names == CONTRACT.split()
    for table in TABLES:
        assert set(KEYS[table]) <= set(SCHEMAS[table].names)


def test_the_same_inputs_give_the_same_cells_to_the_bit(tmp_path: Path, plan: Plan) -> None:
    one, other = RunPaths(tmp_path / "one"), RunPaths(tmp_path / "other")
    fill(one, plan)
    claim(other, plan)
    for unit in reversed(plan.units):  # another order, another cut
        store = ResultStore(other, plan)
        write_unit(store, unit)
        store.commit()
    assert sorted_cells(one).equals(sorted_cells(other), null_equal=True)


def test_a_part_a_partition_and_nothing_else_in_the_tables(paths: RunPaths, plan: Plan) -> None:
    fill(paths, plan)
    files = sorted(
        str(p.relative_to(paths.root)) for p in paths.table("cells").rglob("*") if p.is_file()
    )
    assert len(files) == 1
    assert files[0].startswith("cells/m=tiny/d=world/part-20")
    assert not list(paths.temporary.iterdir())
    columns = pq.ParquetFile(paths.root / files[0]).metadata.row_group(0)
    for index in range(columns.num_columns):
        column = columns.column(index)
        assert column.compression == "ZSTD"
        split = "BYTE_STREAM_SPLIT" in column.encodings
        assert split == (column.physical_type == "DOUBLE"), column.path_in_schema


def test_commits_come_by_units_by_time_and_only_with_something(
    paths: RunPaths, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(paths, plan)
    now = [0.0]
    monkeypatch.setattr(store_module, "COMMIT_UNITS", 2)
    store = ResultStore(paths, plan, clock=lambda: now[0])
    now[0] = 100.0
    assert not store.tick()  # nothing to commit
    write_unit(store, plan.units[0])
    assert store.tick()  # time
    write_unit(store, plan.units[1])
    assert not store.tick()
    write_unit(store, plan.units[2])
    assert store.tick()  # units
    assert len(read(paths.root, "samples")) == 3


def test_a_curve_with_other_centres_than_planned_is_refused(paths: RunPaths, plan: Plan) -> None:
    unit = plan.units[0]
    done = curve_done(unit, unit.curves[0].key)
    wrong = replace(done, center_layer=done.center_layer[::-1])
    with pytest.raises(ValueError, match="the plan holds"):
        ResultStore(paths, plan).add_curve(unit, wrong)


# -- crashes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_nothing_and_can_be_tried_again(
    paths: RunPaths, plan: Plan, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    write_unit(store, plan.units[0])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        match point:
            case "write":
                broken.setattr(parts_module, "serialise", fail)
                broken.setattr(store_module, "serialise", fail)
            case "fsync":
                broken.setattr(os, "fsync", fail)
            case "replace":
                broken.setattr(Path, "replace", fail)
        with pytest.raises(StoreError, match="No space left"):
            store.commit()
    assert read(paths.root).is_empty()
    assert not list(paths.temporary.glob("*"))
    store.commit()
    assert read(paths.root).height == 8


def test_curves_are_committed_before_the_samples_that_vouch_for_them(
    paths: RunPaths, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    write_unit(store, plan.units[0])
    store.add_failure(failure(plan.units[1], None), worker="host:1")
    real, order = store_module.write_atomically, []

    def note(path: Path, data: memoryview, temporary: Path) -> None:
        order.append(path.relative_to(paths.root).parts[0])
        real(path, data, temporary)

    monkeypatch.setattr(store_module, "write_atomically", note)
    store.commit()
    assert order == ["cells", "failures", "samples"]


def test_a_kill_between_curves_and_samples_loses_only_the_samples_row(
    paths: RunPaths, plan: Plan
) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    unit = plan.units[0]
    for curve in unit.curves:
        store.add_curve(unit, curve_done(unit, curve.key))
    store.commit()
    left = {spec.unit_id: spec for spec in remaining(plan, stored_state(paths))}
    assert len(left) == 4
    assert left[unit.unit_id].wanted == frozenset()
    assert left[unit.unit_id].curves == unit.curves


def test_junk_beside_the_parts_is_named_and_left_out(
    paths: RunPaths, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    fill(paths, plan)
    folder = paths.partition("cells", "tiny", "world")
    whole = next(folder.glob("part-*")).read_bytes()
    (folder / "part-2-torn.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "part-3-empty.parquet").write_bytes(b"")
    (folder / "part-4-noise.parquet").write_bytes(os.urandom(999))
    (folder / ".part-5-hidden.parquet").write_bytes(b"junk")
    (folder / "_part-6-hidden.parquet").write_bytes(b"junk")
    (folder / "notes.txt").write_text("hello")
    foreign = paths.partition("samples", "tiny", "world") / "part-1-foreign.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    assert remaining(plan, stored_state(paths)) == []
    assert read(paths.root).height == plan.counts().cells
    for name in ("part-2-torn", "part-3-empty", "part-4-noise", "part-1-foreign"):
        assert name in caplog.text
    assert "hidden" not in caplog.text
    assert query(paths.root, "SELECT count(*) AS n FROM cells")["n"].item() == 32


def test_doubles_are_dropped_by_winner_part(paths: RunPaths, plan: Plan) -> None:
    fill(paths, plan)
    before = sorted_cells(paths)
    zombie = ResultStore(paths, plan, writer_id="ffffffff")
    write_unit(zombie, plan.units[0])
    zombie.commit()
    assert len(list(paths.table("cells").rglob("*.parquet"))) == 2
    assert sorted_cells(paths).equals(before)
    assert read(paths.root, "samples").height == 4
    assert query(paths.root, "SELECT count(*) AS n FROM samples")["n"].item() == 4


def test_a_later_column_does_not_break_older_parts(paths: RunPaths, plan: Plan) -> None:
    fill(paths, plan)
    part = next(paths.table("cells").rglob("*.parquet"))
    table = pq.read_table(part, partitioning=None)
    newer = table.append_column("from_the_future", pa.array([1] * table.num_rows))
    pq.write_table(newer, part.with_name("part-9-newer.parquet"))
    pq.write_table(table.drop_columns(["ordering"]), part)
    assert read(paths.root).columns == SCHEMAS["cells"].names
    assert read(paths.root).height == plan.counts().cells


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import stored_run
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import claim, hold
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state
paths = RunPaths(Path({run!r}))
plan = stored_run.make_plan({n})
with hold(paths):
    claim(paths, plan)
    print("ready", flush=True)
    store = ResultStore(paths, plan)
    for unit in remaining(plan, stored_state(paths)):
        stored_run.write_unit(store, unit)
        store.commit()
    print("done", flush=True)
    time.sleep(60)
"""


def start_driver(paths: RunPaths, n: int) -> subprocess.Popen[str]:
    here = Path(__file__)
    code = KILLED.format(tests=str(here.parent), run=str(paths.root), n=n)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_driver_leaves_whole_parts_a_free_folder_and_a_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    n, seed = 24, 20_260
    whole, paths = RunPaths(tmp_path / "whole"), RunPaths(tmp_path / "killed")
    fill(whole, make_plan(n))
    rng = np.random.default_rng(seed)
    for _ in range(3):
        process = start_driver(paths, n)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunLocked, match=f"process {process.pid} on "), hold(paths):
            pass
        assert driver(paths) is not None
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = remaining(make_plan(n), stored_state(paths))
        print(f"seed {seed}: {n - len(left)} of {n} units survived")
    assert driver(paths) is None
    with hold(paths):
        fill(paths, make_plan(n))
    assert remaining(make_plan(n), stored_state(paths)) == []
    assert sorted_cells(paths).equals(sorted_cells(whole))
    assert not list(paths.temporary.glob("*"))
