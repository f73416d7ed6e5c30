"""The store: whole parts or none, rows once, and a resume that finds what is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avflow.datasets.sample import LETTERS, MediaPart, Sample, TextPart
from avflow.orchestrator import parts as parts_module
from avflow.orchestrator import store as store_module
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.errors import ConfigError, IdentityMismatch, RunLocked, StoreError
from avflow.orchestrator.paths import TABLES, RunPaths
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.policy import Action, Decision, FailureKind
from avflow.orchestrator.results import query, read, status
from avflow.orchestrator.run_folder import (
    claim,
    driver,
    hold,
    record_session,
    sessions,
    stored_config,
)
from avflow.orchestrator.schema import KEYS, SCHEMAS
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state
from avflow.workers.protocol import CurveDone, SampleDone, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

# Not a ModelInfo itself: drivers are started by the dozen below, and torch takes seconds to import.
_SIZES = {"hidden_size": 8, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 16}
INFO = cast("ModelInfo", SimpleNamespace(**_SIZES, n_layers=4, digest="d1"))


def sample(number: int, task: str = "sight") -> Sample:
    options = [
        TextPart(role=role, text=text, index=index)
        for index in range(4)
        for role, text in (("option_letter", LETTERS[index]), ("option_text", ". x\n"))
    ]
    return Sample(
        sample_id=f"{task}-{number}",
        dataset="world",
        task=task,
        category="one sense",
        layout="single_video",
        parts=(
            MediaPart(kind="video", path=f"{number}.mp4", with_audio=True),
            TextPart(role="question", text="Which?"),
            *options,  # type: ignore[arg-type]
        ),
        answer=number % 4,
        media_group=str(number),
    )


def config(**changes: object) -> SweepConfig:
    raw = {
        "name": "test",
        "models": [{"name": "tiny", "family": "qwen2_5_omni", "path": "testbed"}],
        "datasets": [{"name": "world", "reader": "testbed"}],
        "experiments": [
            {"name": "e", "pathways": ["video_to_question", "question_to_last"], "windows": [3]}
        ],
    }
    return SweepConfig.model_validate_json(json.dumps(raw | changes))


def make_plan(n_samples: int = 4, **changes: object) -> Plan:
    samples = tuple(sample(n) for n in range(n_samples))
    loaded = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    return build_plan(config(**changes), {"world": loaded}, {"tiny": INFO})


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def plan() -> Plan:
    return make_plan()


def curve_done(unit: UnitSpec, key: str) -> CurveDone:
    """Numbers that follow from the unit and the curve alone, as a worker's do."""
    spec = next(curve for curve in unit.curves if curve.key == key)
    n = len(spec.center_layers)
    rng = np.random.default_rng(list(f"{unit.unit_id}{key}".encode()))
    return CurveDone(
        unit_id=unit.unit_id,
        curve=key,
        center_layer=np.array(spec.center_layers, dtype=np.int16),
        p_knockout=rng.random(n),
        p_options=rng.random((n, 4)),
        knockout_token=np.array([7 + i % 2 for i in range(n)], dtype=np.int32),
        n_blocked_edges=np.arange(n, dtype=np.int64),
        p_base=0.5,
        base_token=7,
        correct_base=True,
        answer_token=7,
        n_tokens=50,
    )


def sample_done(unit: UnitSpec, *, correct: bool = True) -> SampleDone:
    return SampleDone(
        unit_id=unit.unit_id,
        answer="A",
        predicted="A" if correct else None,
        base_token=7,
        p_base=0.5,
        p_options=np.array([0.5, 0.2, 0.1, 0.1]),
        correct=correct,
        n_tokens=50,
        group_spans={"video": [[3, 9], [12, 15]], "last": [[49, 50]]},
        decode_s=0.1,
        encode_s=0.1,
        prefill_s=0.1,
        replay_s=0.1,
        token_layers=10,
        flops=1e6,
        flops_lower_bound=9e5,
        split_batches=0,
        peak_bytes=1 << 20,
    )


def failure(unit: UnitSpec, curve: str | None, *, terminal: bool = True) -> Decision:
    return Decision(
        action=Action.QUARANTINE if terminal else Action.RETRY,
        kind=FailureKind.EXCEPTION,
        model=unit.model,
        unit=unit,
        failure=UnitFailure(
            unit_id=unit.unit_id,
            curve=curve,
            stage="decode",
            error="MediaError",
            message="no sound track",
            traceback="Traceback ...",
        ),
        attempt=1,
    )


def write_unit(store: ResultStore, unit: UnitSpec) -> None:
    for curve in unit.curves:
        if curve.key in unit.wanted:
            store.add_curve(unit, curve_done(unit, curve.key))
    store.add_sample(unit, sample_done(unit), worker="host:1", attempt=1)


def fill(paths: RunPaths, plan: Plan) -> None:
    """What a session does: claim, then run what is left."""
    claim(paths, plan)
    store = ResultStore(paths, plan)
    for unit in remaining(plan, stored_state(paths)):
        write_unit(store, unit)
    store.commit()


def sorted_cells(paths: RunPaths) -> pl.DataFrame:
    return read(paths.root).sort("job_id", "sample_id")


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
import os, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("store_helpers", {file!r})
helpers = importlib.util.module_from_spec(spec); sys.modules["store_helpers"] = helpers
spec.loader.exec_module(helpers)
from avflow.orchestrator.run_folder import claim, hold
paths = helpers.RunPaths(Path({run!r}))
plan = helpers.make_plan({n})
with hold(paths):
    claim(paths, plan)
    print("ready", flush=True)
    store = helpers.ResultStore(paths, plan)
    for unit in helpers.remaining(plan, helpers.stored_state(paths)):
        helpers.write_unit(store, unit)
        store.commit()
    print("done", flush=True)
    time.sleep(60)
"""


def start_driver(paths: RunPaths, n: int) -> subprocess.Popen[str]:
    here = Path(__file__)
    code = KILLED.format(tests=str(here.parent), file=str(here), run=str(paths.root), n=n)
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


# -- what is left ----------------------------------------------------------------------------


def test_a_wrong_baseline_calls_for_nothing_more(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    store.add_sample(
        plan.units[0], sample_done(plan.units[0], correct=False), worker="h:1", attempt=1
    )
    store.commit()
    assert len(remaining(plan, stored_state(paths))) == 3
    experiments = [
        {"name": "e", "pathways": ["video_to_question"], "samples": "all"},
        {"name": "f", "pathways": ["question_to_last"]},
    ]
    for experiment in experiments:
        experiment["windows"] = [3]  # type: ignore[assignment]
    both = make_plan(experiments=experiments)
    left = {spec.unit_id: spec for spec in remaining(both, stored_state(paths))}
    assert left[plan.units[0].unit_id].wanted == {"video_to_question/k3/letter"}


def test_what_was_given_up_stays_so_until_it_is_asked_for(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    one, two, three, four = plan.units
    key = one.curves[0].key
    store.add_failure(failure(one, None), worker="host:1")
    store.add_failure(failure(two, key), worker="host:1")
    store.add_failure(failure(three, key, terminal=False), worker="host:1")
    store.add_curve(four, curve_done(four, key))
    store.commit()
    left = {spec.unit_id: spec.wanted for spec in remaining(plan, stored_state(paths))}
    assert left == {
        two.unit_id: two.wanted - {key},
        three.unit_id: three.wanted,
        four.unit_id: four.wanted - {key},
    }
    again = {u.unit_id: u.wanted for u in remaining(plan, stored_state(paths), retry_failed=True)}
    assert again == left | {one.unit_id: one.wanted, two.unit_id: two.wanted}


def test_status_and_tasks_follow_the_store(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    empty = status(paths.root)
    assert (empty.jobs, empty.jobs_done, empty.jobs_running, empty.samples) == (8, 0, 0, 4)
    assert not empty.complete
    store = ResultStore(paths, plan)
    one, two, three, four = plan.units
    write_unit(store, one)
    store.add_sample(two, sample_done(two, correct=False), worker="h:1", attempt=1)
    store.commit()
    now = status(paths.root)
    assert (now.jobs_running, now.samples_done, now.samples_correct, now.cells) == (8, 2, 1, 8)
    store.add_failure(failure(three, None), worker="h:1")
    write_unit(store, replace(four, wanted=four.wanted - {four.curves[0].key}))
    store.add_failure(failure(four, four.curves[0].key), worker="h:1")
    store.commit()
    now = status(paths.root)
    assert (now.jobs_failed, now.jobs_done, now.jobs_running) == (8, 0, 0)
    assert (now.samples_done, now.samples_failed) == (2, 2)
    assert now.complete
    (task,) = now.tasks
    assert (task.planned, task.right, task.wrong, task.failed) == (4, 1, 1, 2)
    for unit in remaining(plan, stored_state(paths), retry_failed=True):  # mended
        write_unit(store, unit)
    store.commit()
    now = status(paths.root)
    assert (now.jobs_failed, now.jobs_done, now.samples_failed) == (0, 8, 0)
    assert read(paths.root, "failures").height == 2  # they happened, all the same


# -- the folder ------------------------------------------------------------------------------


def test_another_sweep_is_refused_with_what_differs(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    before = paths.sweep.read_bytes()
    experiments = [{"name": "e", "pathways": ["video_to_question", "question_to_last"]}]
    other = make_plan(experiments=[experiments[0] | {"windows": [1]}])
    with pytest.raises(IdentityMismatch, match=r"experiments\[0\].windows\[0\]: 1 here, 3 there"):
        claim(paths, other)
    with pytest.raises(IdentityMismatch, match=r"identity\.datasets\.world"):
        claim(paths, make_plan(5))
    assert paths.sweep.read_bytes() == before


def test_run_time_fields_may_change_and_the_resolved_sweep_stays_the_same(
    paths: RunPaths, plan: Plan
) -> None:
    claim(paths, plan)
    stamp = paths.sweep.stat().st_mtime_ns
    claim(paths, plan)
    assert paths.sweep.stat().st_mtime_ns == stamp
    claim(paths, make_plan(execution={"workers": 7, "limit": 2}, name="renamed"))
    assert stored_config(paths).execution.limit == 2
    assert len(pl.read_parquet(paths.units)) == 2
    resolved = stored_config(paths)
    assert resolved.experiments[0].tasks == ("sight",)
    assert resolved.identity is not None
    assert resolved.identity.models == {"tiny": "d1"}


def test_an_unwritable_run_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"), hold(RunPaths(tmp_path / "file")):
        pass


def test_a_folder_that_is_no_run_is_said_to_be_none(
    tmp_path: Path, paths: RunPaths, plan: Plan
) -> None:
    with pytest.raises(StoreError, match="no run folder"):
        read(tmp_path)
    claim(paths, plan)
    with pytest.raises(ConfigError, match="did you mean 'cells'"):
        read(paths.root, "cell")
    with pytest.raises(ConfigError, match="tables: cells"):
        query(paths.root, "SELECT nothing FROM nowhere")


def test_sessions_are_lines_and_a_torn_one_is_passed_over(paths: RunPaths, plan: Plan) -> None:
    with hold(paths):
        claim(paths, plan)
        record_session(paths, plan, ["avflow", "sweep"])
        record_session(paths, plan, ["avflow", "resume"])
    with paths.provenance.open("a") as file:
        file.write('{"at": "20')
    lines = sessions(paths)
    assert [line["argv"][1] for line in lines] == ["sweep", "resume"]  # type: ignore[index]
    assert lines[0]["packages"]["pyarrow"] == pa.__version__  # type: ignore[index]


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    parts_module._warned.clear()
