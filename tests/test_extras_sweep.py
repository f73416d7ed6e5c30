"""Whole sweeps with interventions and probes: planned, run, killed, resumed, counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from kill_steps import harness
from tiny_sweep import write_sweep

from avflow.orchestrator.config import load_config
from avflow.orchestrator.errors import ConfigError, ExitStatus
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import read, standing_failures, status
from avflow.orchestrator.stored import stored_state
from avflow.orchestrator.sweep import SweepOutcome, plan_sweep, run_sweep
from avflow.orchestrator.views import show_status
from avflow.orchestrator.views_plan import show_plan

INTERVENTIONS: list[dict[str, Any]] = [
    {
        "name": "late_layers",
        "masks": [
            {"name": "video_for_last", "pathways": ["video_to_last"], "layers": [2, 3]},
            {
                "name": "video_for_text",
                "pathways": ["video_to_question", "video_to_last"],
                "layers": [2, 3],
            },
            {"name": "question_for_last", "pathways": ["question_to_last"], "layers": [3]},
        ],
    },
    {
        "name": "token_removal",
        "discards": [
            {"name": "full", "steps": []},
            {
                "name": "all",
                "steps": [
                    {"after_layer": 1, "groups": ["video", "audio"]},
                    {"after_layer": 2, "groups": ["non_option_question"]},
                ],
            },
            {"name": "items", "steps": [{"after_layer": 1, "groups": ["candidates"]}]},
        ],
    },
]
PROBES: list[dict[str, Any]] = [
    {"name": "allocation", "probe": "last_attention"},
    {"name": "maps", "probe": "attention_map", "layers": [1, 2], "samples_per_task": 1, "seed": 7},
    {"name": "norms", "probe": "norms", "layers": [0, 3], "samples_per_task": 1, "seed": 7},
    {"name": "sinks", "probe": "sinks", "layers": [0, 3], "samples_per_task": 1, "seed": 7},
]
# Of the tiny sweep's two tasks, `sight` is a single video and `match_image` interleaved.
OF_SINGLE_VIDEO = {"mask/video_for_last", "mask/video_for_text", "discard/all"}
OF_INTERLEAVED = {"discard/items"}
OF_BOTH = {"mask/question_for_last", "discard/full", "probe/last_attention"}
OF_ONE_SAMPLE = {"probe/attention_map", "probe/norms", "probe/sinks"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    write(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)


def write(folder: Path, name: str = "sweep", **changes: Any) -> Path:
    """The tiny sweep with a curve or two, and everything above; None takes a section out."""
    path = write_sweep(folder, name=name)
    sections = yaml.safe_load(path.read_text())
    sections["experiments"][0]["pathways"] = ["video_to_last", "candidates_to_last"]
    sections["experiments"][0]["windows"] = [1]
    sections |= {"interventions": INTERVENTIONS, "probes": PROBES} | changes
    kept = {key: value for key, value in sections.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def planned(path: Path) -> Plan:
    return plan_sweep(load_config(path))


def run(path: Path, folder: Path, *, only_failed: bool = False) -> SweepOutcome:
    return run_sweep(load_config(path), folder, only_failed=only_failed, progress=Silent())


def tables(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What the same inputs give again."""
    interventions = read(folder, "interventions").drop("prefill_s")
    probes = read(folder, "probes")
    keys = ["sample_id", "probe", "layer", "group", "position", "key", "dimension"]
    return interventions.sort("sample_id", "kind", "intervention"), probes.sort(keys)


# -- planning --------------------------------------------------------------------------------


def test_each_units_extras_are_those_of_its_kind_of_prompt_and_draw(place: Path) -> None:
    plan = planned(place / "sweep.yaml")
    drawn: Counter[str] = Counter()
    for unit in plan.units:
        keys = {spec.key for spec in unit.extras}
        single = unit.sample.layout == "single_video"
        assert keys - OF_ONE_SAMPLE == OF_BOTH | (OF_SINGLE_VIDEO if single else OF_INTERLEAVED)
        assert unit.wanted == {spec.key for spec in unit.work}
        drawn.update((keys & OF_ONE_SAMPLE) and {unit.sample.task})
    assert drawn == {"sight": 1, "match_image": 1}
    counts = plan.counts()
    assert (counts.interventions, counts.probes) == (2 * 5 + 2 * 3, 4 + 2 * 3)
    assert counts.forward_passes == counts.cells + counts.interventions + 4


def test_probes_watch_a_pass_that_is_counted_already(place: Path) -> None:
    without = {u.unit_id: u.cost for u in planned(write(place, "without", probes=None)).units}
    assert {u.unit_id: u.cost for u in planned(place / "sweep.yaml").units} == without


def test_a_limit_draws_none_but_the_samples_of_the_whole_run(place: Path) -> None:
    config = load_config(place / "sweep.yaml")
    whole = {u.unit_id: u.extras for u in plan_sweep(config).units}
    for unit in plan_sweep(config.with_execution(limit=1)).units:
        assert unit.extras == whole[unit.unit_id]


def test_another_seed_may_draw_other_samples(place: Path) -> None:
    def drawn(seed: int) -> set[str]:
        probes = [{**PROBES[2], "seed": seed}]
        plan = planned(write(place, f"seed{seed}", probes=probes))
        return {u.unit_id for u in plan.units if "probe/norms" in u.wanted}

    assert len({frozenset(drawn(seed)) for seed in range(8)}) > 1
    assert drawn(3) == drawn(3)


def test_what_two_sections_ask_alike_runs_once_and_unlike_is_refused(place: Path) -> None:
    alike = [PROBES[0], {**PROBES[0], "name": "again", "samples": "correct"}]
    (spec,) = {
        u.extras for u in planned(write(place, "alike", probes=alike, interventions=None)).units
    }
    assert [(one.key, one.correct_only) for one in spec] == [("probe/last_attention", False)]
    unlike = [PROBES[0], {**PROBES[0], "name": "again", "layers": [1]}]
    with pytest.raises(ConfigError, match=r"probe 'last_attention' is asked .* twice") as refused:
        planned(write(place, "unlike", probes=unlike))
    assert "probes[1]" in str(refused.value)


def test_the_plan_shows_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(place / "sweep.yaml")
    show_plan(plan, as_json=False)
    text = capsys.readouterr().out
    assert "\n16 interventions and 10 probes, each on one sample\n" in text
    assert [line.split() for line in text.splitlines() if "mask/video_for_text" in line] == [
        ["mask/video_for_text", "2-3", "1", "2"]  # of one task, on two samples
    ]
    show_plan(plan, as_json=True)
    assert json.loads(capsys.readouterr().out)["interventions"] == 16


# -- refusals --------------------------------------------------------------------------------

MASK = {"name": "m", "pathways": ["video_to_last"], "layers": [3]}


def only(**intervention: Any) -> dict[str, Any]:
    return {"interventions": [{"name": "i", **intervention}], "probes": None}


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (only(), "interventions[0]", "give `masks` or `discards`"),
        (
            only(masks=[{**MASK, "pathways": ["video_to_lsat"]}]),
            "interventions[0].masks[0].pathways[0]",
            "unknown pathway 'video_to_lsat'; did you mean 'video_to_last'?",
        ),
        (
            only(masks=[{**MASK, "pathways": ["video_to_last", "candidates_to_last"]}]),
            "interventions[0].masks[0].pathways",
            "no kind of prompt has all of these",
        ),
        (only(masks=[{**MASK, "layers": [3, 2]}]), "masks[0]", "layers must ascend"),
        (only(masks=[MASK, MASK]), "interventions[0].masks[1].name", "'m' is there already"),
        (
            only(masks=[{**MASK, "layers": [3, 4]}]),
            "interventions[0].masks[0].layers[1]",
            "model 'tiny' has no layer 4; its layers are 0 to 3",
        ),
        (
            only(discards=[{"name": "d", "steps": [{"after_layer": 1, "groups": ["vidoe"]}]}]),
            "interventions[0].discards[0].steps[0].groups[0]",
            "unknown group 'vidoe'; did you mean 'video'?",
        ),
        (
            only(discards=[{"name": "d", "steps": [{"after_layer": 1, "groups": ["last"]}]}]),
            "interventions[0].discards[0].steps[0].groups[0]",
            "the last token can't be discarded",
        ),
        (
            only(discards=[{"name": "d", "steps": [{"after_layer": 3, "groups": ["video"]}]}]),
            "interventions[0].discards[0].steps[0].after_layer",
            "nothing can be discarded after layer 3 of model 'tiny'",
        ),
        (
            only(tasks=["sight"], discards=INTERVENTIONS[1]["discards"][2:]),
            "interventions[0].discards[0]",
            "no chosen task's prompts have all of its groups",
        ),
        (only(models=["big"], masks=[MASK]), "interventions[0].models[0]", "unknown model 'big'"),
        ({"probes": [{**PROBES[2], "layers": [9]}]}, "probes[0].layers[0]", "has no layer 9"),
        ({"probes": [{**PROBES[2], "tasks": ["sond"]}]}, "probes[0].tasks[0]", "unknown task"),
        (
            {"experiments": None, "interventions": None, "probes": None},
            "",
            "give `experiments`, `interventions` or `probes`",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) and value else "",
)
def test_nonsense_is_refused_by_field_and_line_before_anything_starts(
    place: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    path = write(place, "nonsense", **changes)
    with pytest.raises(ConfigError) as refused:
        planned(path)
    text = str(refused.value)
    assert message in text
    assert field in text
    if field:
        line = int(text.split("nonsense.yaml:")[1].split(":", maxsplit=1)[0])
        last = field.rsplit(".", maxsplit=1)[-1].partition("[")[0]
        assert last in path.read_text().splitlines()[line - 1] or field.endswith("]")


# -- running ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of an undisturbed run in process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
        assert run(place / "sweep.yaml", place / "whole").exit_status == ExitStatus.DONE
    return place / "whole"


def test_every_planned_row_is_in_its_table(place: Path, whole: Path) -> None:
    interventions, probes = tables(whole)
    assert interventions.height == 16
    kinds = interventions.group_by("kind", "intervention").len().rows()
    assert sorted(kinds) == [
        ("discard", "all", 2), ("discard", "full", 4), ("discard", "items", 2),
        ("mask", "question_for_last", 4), ("mask", "video_for_last", 2),
        ("mask", "video_for_text", 2),
    ]  # fmt: skip
    assert (interventions["p"].is_between(0, 1)).all()
    timed = read(whole, "interventions").filter(kind="discard")
    assert (timed["prefill_s"] > 0).all()
    full = timed.filter(intervention="full").select("sample_id", full="token_layers")
    less = timed.filter(pl.col("intervention") != "full").join(full, on="sample_id")
    assert (less["token_layers"] < less["full"]).all()
    samples = read(whole, "samples").select("sample_id", "n_tokens", right="correct")
    joined = full.join(samples, on="sample_id")
    assert (joined["full"] == 4 * joined["n_tokens"]).all()
    same = interventions.filter(intervention="full").join(samples, on="sample_id")
    assert (same["correct"] == same["right"]).all()
    assert set(probes["probe"]) == {"last_attention", "attention_map", "norms", "sinks"}
    disjoint = ["system", "video", "audio", "question", "last", "template"]
    of_video = probes.filter(pl.col("task") == "sight", pl.col("probe") == "last_attention")
    share = of_video.filter(pl.col("group").is_in(disjoint)).group_by("sample_id", "layer")
    assert share.agg(pl.col("value").sum())["value"].is_between(0.9, 1.2).all()
    norms = probes.filter(probe="norms").group_by("sample_id", "layer").len()
    assert (
        norms.join(samples, on="sample_id").select(pl.col("len") == pl.col("n_tokens"))["len"].all()
    )
    assert probes.filter(probe="norms")["value"].min() > 0


def test_status_counts_them(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = status(whole)
    assert (now.extras, now.extras_done, now.extras_failed) == (26, 26, 0)
    assert now.complete
    show_status(whole, watch=False, as_json=False)
    assert "26 interventions and probes: 26 done, 0 failed, 0 waiting" in capsys.readouterr().out


def test_running_again_runs_nothing_and_a_lost_part_is_made_again(
    place: Path, tmp_path: Path
) -> None:
    path = write(place, "again", experiments=None, interventions=INTERVENTIONS[:1])
    folder = tmp_path / "run"
    assert run(path, folder).counts.ran == 4
    before = tables(folder)
    assert run(path, folder).counts.ran == 0
    for part in (folder / "probes").rglob("*.parquet"):
        part.unlink()
    assert status(folder).extras_done == 8
    assert run(path, folder).counts.ran == 4
    for one, other in zip(before, tables(folder), strict=True):
        assert one.equals(other)


@pytest.mark.slow
def test_killed_anywhere_and_resumed_gives_equal_rows(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    expected, keys = tables(whole), stored_state(RunPaths(whole)).curves
    with harness(place / "sweep.yaml") as run_step:
        for moment in ("curve:5", "curve:13", "torn:9", "renamed:8", "sample:2"):
            folder = tmp_path / moment.replace(":", "-")
            assert run_step({"run": str(folder), "at": moment})["ended"] == -9, moment
            kept = stored_state(RunPaths(folder)).curves
            resumed = run_step({"run": str(folder)})
            assert resumed["ended"] == 0, moment
            assert {f"{unit} {key}" for unit, key in kept}.isdisjoint(resumed["curves"]), moment
            assert stored_state(RunPaths(folder)).curves == keys, moment
            for one, other in zip(expected, tables(folder), strict=True):
                assert one.equals(other), moment


def test_what_fails_is_named_and_taken_up_again_when_mended(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(place, "failing", experiments=None)
    folder = tmp_path / "run"

    def broken(*_: Any) -> Any:
        raise RuntimeError("no timing today")

    with monkeypatch.context() as patch:
        patch.setattr("avflow.workers.extras.timed_prefill", broken)
        outcome = run(path, folder)
    assert outcome.exit_status == ExitStatus.WITH_FAILURES
    now = status(folder)
    assert (now.extras_done, now.extras_failed, now.samples_failed) == (18, 8, 4)
    standing = standing_failures(folder)
    assert Counter(standing["curve"]) == {"discard/full": 4, "discard/all": 2, "discard/items": 2}
    assert set(standing["stage"]) == {"discard"}
    assert run(path, folder).counts.ran == 0, "given up for good, unless asked"
    assert run(path, folder, only_failed=True).exit_status == ExitStatus.DONE
    assert standing_failures(folder).is_empty()
    assert status(folder).extras_done == 26
