"""A run folder that a person, a kill or an odd file name left in a strange state."""

from dataclasses import replace
from pathlib import Path

import pytest
from stored_run import failure, make_plan

from avflow.orchestrator.errors import IdentityMismatch
from avflow.orchestrator.load import parse
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import claim, record_session, sessions, stored_config
from avflow.orchestrator.store import ResultStore


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def plan() -> Plan:
    return make_plan()


def edit(paths: RunPaths, old: str, new: str) -> None:
    text = paths.sweep.read_text()
    assert old in text
    paths.sweep.write_text(text.replace(old, new))


def test_a_sweep_file_that_was_edited_in_its_folder_mixes_no_rows(
    paths: RunPaths, plan: Plan
) -> None:
    """`avflow resume RUN` reads the folder's own file, so comparing it with itself says nothing."""
    claim(paths, plan)
    edit(paths, "max_frames: 128", "max_frames: 16")
    edited = replace(plan, config=parse(paths.sweep))
    with pytest.raises(IdentityMismatch, match=r"models\[0\].max_frames: 16 here, 128 there") as no:
        claim(paths, edited)
    assert f"put {paths.sweep} back as it was" in str(no.value)
    edit(paths, "max_frames: 16", "max_frames: 128")
    claim(paths, replace(plan, config=parse(paths.sweep)))


def test_run_time_fields_may_be_edited_there(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    edit(paths, "limit: null", "limit: 3")
    claim(paths, replace(plan, config=parse(paths.sweep)))
    assert stored_config(paths).execution.limit == 3


def test_a_folder_whose_first_driver_was_killed_before_its_plan_was_whole_is_taken_up(
    paths: RunPaths, plan: Plan
) -> None:
    claim(paths, plan)
    paths.units.write_bytes(paths.units.read_bytes()[:100])
    claim(paths, plan)
    assert paths.units.read_bytes()[-4:] == b"PAR1"


def test_a_torn_session_line_takes_no_other_with_it(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    record_session(paths, plan, ["first"])
    with paths.provenance.open("a") as file:
        file.write('{"at": "20')
    record_session(paths, plan, ["second"])
    record_session(paths, plan, ["third"])
    assert [line["argv"] for line in sessions(paths)] == [["first"], ["second"], ["third"]]


def test_a_failure_that_names_a_file_in_no_unicode_is_stored(paths: RunPaths, plan: Plan) -> None:
    claim(paths, plan)
    attempt = failure(plan.units[0], None)
    odd = "caf\udce9.mp4"  # what Python makes of a name in Latin-1
    store = ResultStore(paths, plan)
    said = replace(attempt.failure, message=f"{odd} is gone", traceback=f"open({odd})")
    store.add_failure(replace(attempt, failure=said), worker="h:1")
    store.commit()
    (row,) = read(paths.root, "failures").to_dicts()
    assert (row["message"], row["traceback"]) == (r"caf\udce9.mp4 is gone", r"open(caf\udce9.mp4)")
