"""A run folder between sessions: what is left of its sweep, whose it is, who writes to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from stored_run import curve_done, failure, make_plan, sample_done, write_unit

from avflow.orchestrator.errors import ConfigError, IdentityMismatch, StoreError
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.results import query, read, status
from avflow.orchestrator.run_folder import (
    claim,
    hold,
    record_session,
    sessions,
    stored_config,
)
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def plan() -> Plan:
    return make_plan()


# -- what is left ----------------------------------------------------------------------------


def test_a_wrong_baseline_calls_for_nothing_more(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    store = ResultStore(paths, plan)
    store.add_sample(
        plan.units[0], sample_done(plan.units[0], correct=False), worker="h:1", attempt=1
    )
    store.commit()
    assert len(remaining(plan, stored_state(paths))) == 3
    experiments: list[dict[str, Any]] = [
        {"name": "e", "pathways": ["video_to_question"], "samples": "all"},
        {"name": "f", "pathways": ["question_to_last"]},
    ]
    for experiment in experiments:
        experiment["windows"] = [3]
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


def test_a_disk_that_fills_up_before_the_first_sample_is_said_to_be_full(
    paths: RunPaths, plan: Plan
) -> None:
    claim(paths, plan)
    paths.provenance.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"can't be written: .*No space left"):
        record_session(paths, plan, ["avflow"])


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
    lines: list[dict[str, Any]] = sessions(paths)
    assert [line["argv"][1] for line in lines] == ["sweep", "resume"]
    assert lines[0]["packages"]["pyarrow"] == pa.__version__
