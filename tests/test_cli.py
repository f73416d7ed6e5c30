"""The command as a person meets it: what it prints, and the status it leaves."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import in_process
import pytest
import yaml
from safetensors.numpy import load_file

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def avflow(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process; its exit status and everything it printed."""
    monkeypatch.setenv("AVFLOW_CACHE", str(cache))

    def run(*words: object) -> tuple[int, str]:
        done = in_process.avflow(*words, columns=200)
        return done.returncode, done.said

    return run


def sweep_file(folder: Path, **changes: object) -> Path:
    """The demo, small: two tasks, two pathways, two samples a task; top-level fields changed."""
    config = yaml.safe_load(DEMO.read_text())
    config["datasets"][0]["settings"] |= {"samples_per_task": 2, "tasks": ["sight", "match_image"]}
    config["experiments"][0] |= {
        "pathways": ["video_to_question", "question_to_last"],
        "samples": "all",
    }
    config["execution"] = {"executor": "local"}
    for path, value in changes.items():
        at = config
        *parents, last = path.split("__")
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at[key]
        at[last] = value
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_help_names_every_verb_and_the_exit_statuses(avflow: Run) -> None:
    status, said = avflow("--help")
    assert status == 0
    for verb in (
        "plan",
        "sweep",
        "resume",
        "status",
        "failures",
        "query",
        "track",
        "compact",
        "demo",
        "ui",
        "inspect",
    ):
        assert re.search(rf"\b{verb}\b", said)
    assert "finished but something failed" in said.replace("\n", " ")


def test_a_sweep_from_file_to_answers(avflow: Run, tmp_path: Path) -> None:
    file, run = sweep_file(tmp_path), tmp_path / "run"
    status, said = avflow("plan", file, "--json")
    plan = json.loads(said)
    assert (status, plan["jobs"]) == (0, 8 * 3)  # sight: 2 pathways, match_image: 1; 8 centres
    assert plan["cells"] == 2 * plan["jobs"]
    (needed,) = plan["memory_bytes"].values()
    assert needed["peak"] > needed["weights"] == 4 * 1_244_128

    status, said = avflow("sweep", file, "--run", run)
    assert status == 0
    assert "What was found" in said
    assert f"avflow ui {run}" in said
    assert (run / "report" / "findings.txt").is_file()

    status, said = avflow("status", run, "--json")
    now = json.loads(said)
    assert (now["jobs"], now["jobs_done"], now["samples_failed"]) == (24, 24, 0)

    sql = "SELECT pathway, COUNT(*) AS n FROM cells GROUP BY pathway ORDER BY pathway"
    status, said = avflow("query", run, sql, "--format", "csv")
    assert said.splitlines() == ["pathway,n", "question_to_last,32", "video_to_question,16"]
    assert avflow("query", run, "SELECT nothing FROM cells")[0] == 2
    assert avflow("failures", run) == (0, "Nothing has failed.\n")

    status, said = avflow("sweep", file, "--run", run)  # nothing is left to do
    assert status == 0
    assert "0 were due now" in said


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("experiments__0__pathways", ["video_to_qestion"], ["video_to_question", "known"]),
        ("models__0__family", "qwen9", ["qwen2_5_omni"]),
        ("experiments__0__tasks", ["sigth"], ["sight"]),
        ("experiments__0__windows", [9], ["a window of 9 layers", "has 8"]),
        ("models__0__path", "no/such/folder", ["no/such/folder"]),
        ("experiments__0__smaples", "all", ["smaples", "samples"]),
    ],
)
def test_a_wrong_sweep_file_is_refused_by_name(
    avflow: Run, tmp_path: Path, field: str, value: object, expected: list[str]
) -> None:
    file = sweep_file(tmp_path, **{field: value})
    status, said = avflow("sweep", file, "--run", tmp_path / "run")
    assert status == 2
    for words in [*expected, "sweep.yaml"]:
        assert words in said
    assert not (tmp_path / "run" / "cells").exists()


def test_another_sweeps_run_folder_is_refused(avflow: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert avflow("sweep", sweep_file(tmp_path), "--run", run, "--limit", 1)[0] == 0
    other = sweep_file(tmp_path, models__0__system_prompt="You are a pirate.")
    status, said = avflow("sweep", other, "--run", run)
    assert status == 2
    assert "system_prompt" in said


def test_a_run_folder_that_cannot_be_made_is_refused(avflow: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said = avflow("sweep", sweep_file(tmp_path), "--run", tmp_path / "file" / "run")
    assert status == 2
    assert "can't be written" in said


def test_reading_what_is_no_run_folder(avflow: Run, tmp_path: Path) -> None:
    for verb in ("status", "failures", "resume", "report", "track", "ui"):
        status, said = avflow(verb, tmp_path)
        assert (verb, status) == (verb, 2)
        assert "no run folder" in said


def test_inspect_shows_the_layout_and_dumps_the_inputs(avflow: Run, tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    target = tmp_path / "in.safetensors"
    status, said = avflow("inspect", file, "--sample", "sight", "--dump", target)
    assert status == 0
    assert "option_letter:C" in said
    assert "Which colour" in said
    dumped = load_file(target)
    n = dumped["input_ids"].shape[1]
    assert dumped["inputs_embeds"].shape[:2] == (1, n)
    assert dumped["position_ids"].shape == (3, 1, n)
    assert dumped["group.last"].tolist() == [n - 1]

    status, said = avflow("inspect", file, "--sample", "sight", "--edges", "question_to_last")
    assert status == 0
    assert f"{len(dumped['group.question'])} edges a layer" in said
    status, said = avflow("inspect", file, "--sample", "sigt")
    assert status == 2
    assert "sight" in said
