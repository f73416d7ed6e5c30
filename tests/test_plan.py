"""The plan: which jobs and units follow from a sweep file, and that nothing else changes them."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avflow.datasets.prompts import option_list
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.errors import ConfigError, IdentityMismatch
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.run_folder import to_yaml
from avflow.pathways.catalogue import INTERLEAVED, SINGLE_VIDEO
from avflow.workers.models.base import ModelInfo

INFO = ModelInfo(
    n_layers=6,
    hidden_size=8,
    n_heads=2,
    n_kv_heads=1,
    head_size=4,
    intermediate_size=16,
    vocab_size=100,
    parameters=5000,
    digest="d1",
)


def clip(number: int, task: str = "sight", question: str = "Which colour?") -> Sample:
    return Sample(
        sample_id=f"{task}-{number}",
        dataset="world",
        task=task,
        category="c",
        layout="single_video",
        parts=(
            MediaPart(kind="video", path=f"{number}.mp4", with_audio=True),
            TextPart(role="question", text=question),
            *option_list(["red"] * 4),
        ),
        answer=number % 4,
        media_group=str(number),
    )


def items(number: int, task: str = "match") -> Sample:
    candidates = tuple(
        MediaPart(kind="image", path=f"{i}.png", role="candidate", index=i) for i in range(4)
    )
    return replace(
        clip(number, task),
        layout="interleaved",
        parts=(
            *candidates,
            TextPart(role="question", text="Which image?"),
            MediaPart(kind="audio", path="r.wav", role="reference"),
            *option_list(["red"] * 4),
        ),
        correct_candidate=number % 4,
        direction="audio_to_image",
        ordering="candidates-question-reference",
    )


WORLD = (*(clip(n) for n in range(3)), clip(0, "sound"), *(items(n) for n in range(2)))
RAW: dict[str, Any] = {
    "name": "test",
    "models": [{"name": "tiny", "family": "qwen2_5_omni", "path": "testbed"}],
    "datasets": [{"name": "world", "reader": "testbed"}],
    "experiments": [{"name": "e", "windows": [3]}],
}


def plan(
    *experiments: Mapping[str, Any],
    samples: Sequence[Sample] = WORLD,
    info: ModelInfo = INFO,
    **changes: Any,
) -> Plan:
    raw = RAW | changes
    if experiments:
        named = [{"name": f"e{n}", "windows": [3], **e} for n, e in enumerate(experiments)]
        raw |= {"experiments": named}
    config = SweepConfig.model_validate_json(json.dumps(raw))
    loaded = LoadedDataset(
        root=Path("/x"), samples=tuple(samples), fingerprint=fingerprint(samples)
    )
    models = {model.name: info for model in config.models}
    return build_plan(config, {"world": loaded}, models)


def ids(built: Plan) -> dict[tuple[str, str, str, int, int], str]:
    return {
        (job.task, job.layout, job.pathway + job.variant, job.window, job.center_layer): job.job_id
        for job in built.jobs()
    }


# -- enumeration -----------------------------------------------------------------------------


def test_all_pathways_run_on_their_kind_of_prompt() -> None:
    built = plan()
    for unit in built.units:
        expected = SINGLE_VIDEO if unit.sample.layout == "single_video" else INTERLEAVED
        assert {curve.pathway for curve in unit.curves} == set(expected)
        assert all(curve.center_layers == tuple(range(6)) for curve in unit.curves)
        assert unit.wanted == {curve.key for curve in unit.curves}
    counts = built.counts()
    assert counts.jobs == (22 + 22 + 15) * 6
    assert (counts.units, counts.samples) == (6, 6)
    assert counts.curves == 4 * 22 + 2 * 15
    assert counts.cells == counts.curves * 6
    assert counts.forward_passes == counts.cells + 6
    jobs = list(built.jobs())
    assert len({job.job_id for job in jobs}) == len(jobs) == counts.jobs
    assert {job.samples for job in jobs if job.task == "sight"} == {3}


def test_question_to_last_is_two_jobs_where_both_kinds_of_prompt_share_a_task() -> None:
    built = plan({"pathways": ["question_to_last"]}, samples=[clip(0, "t"), items(1, "t")])
    assert len({job.job_id for job in built.jobs()}) == 12
    assert [unit.curves[0].pathway.layout for unit in built.units] != []


def test_axes_are_a_product_with_include_and_exclude() -> None:
    built = plan(
        {
            "pathways": ["video_to_question", "audio_to_question"],
            "windows": [1, 3],
            "center_layers": [4, 0],
            "tasks": ["sight", "sound"],
            "exclude": [{"tasks": ["sound"], "windows": [1]}],
        }
    )
    found = {(job.task, job.pathway, job.window, job.center_layer) for job in built.jobs()}
    assert len(found) == 2 * 2 * 2 * 2 - 4
    assert not {key for key in found if key[0] == "sound" and key[2] == 1}
    included = plan({"include": [{"pathways": ["video_to_last"]}, {"tasks": ["match"]}]})
    assert {job.pathway for job in included.jobs() if job.task != "match"} == {"video_to_last"}
    assert len({job.pathway for job in included.jobs() if job.task == "match"}) == 15


def test_what_two_experiments_share_runs_once() -> None:
    one = {"pathways": ["video_to_last"], "center_layers": [0, 1], "tasks": ["sight"]}
    other = one | {"center_layers": [1, 2], "samples": "all"}
    built = plan(one, other)
    (curve,) = built.units[0].curves
    assert curve.center_layers == (0, 1, 2)
    assert not curve.correct_only
    assert built.counts().jobs == 3
    apart = plan(one, one | {"option_span": "full"})
    assert [c.key for c in apart.units[0].curves] == [
        "video_to_last/k3/full",
        "video_to_last/k3/letter",
    ]


def test_limit_takes_the_first_of_each_task_and_changes_no_job() -> None:
    limited = plan(execution={"limit": 1})
    assert sorted(u.sample.sample_id for u in limited.units) == ["match-0", "sight-0", "sound-0"]
    assert ids(limited) == ids(plan())


def test_units_know_how_long_their_files_may_take() -> None:
    (unit, *_) = plan(execution={"decode_timeout_s": 600}).units
    assert unit.decode_timeout_s == 600


def test_units_come_costliest_first_and_costs_follow_length() -> None:
    long = clip(9, question="Which colour? " * 200)
    built = plan(samples=[clip(0), long, items(1)])
    costs = [unit.cost for unit in built.units]
    assert costs == sorted(costs, reverse=True)
    by_id = {unit.sample.sample_id: unit.cost for unit in built.units}
    assert by_id["sight-9"] > by_id["sight-0"] > 0
    assert built.cost.plain > built.cost.token_layers > 0
    late = plan({"pathways": ["question_to_last"]}, samples=[clip(0)]).cost
    early = plan({"pathways": ["cross_frame"]}, samples=[clip(0)]).cost
    assert late.plain == early.plain
    assert late.token_layers < 0.3 * early.token_layers


def test_a_sample_that_makes_no_sense_is_planned_all_the_same() -> None:
    broken = replace(clip(0), answer=9)
    built = plan(samples=[broken])
    assert len(built.units) == 1  # its worker will say what is wrong with it


# -- identity --------------------------------------------------------------------------------


def test_job_ids_follow_from_identity_alone() -> None:
    before = ids(plan())
    assert ids(plan(name="renamed", execution={"workers": 5, "limit": 2})) == before
    moved = [RAW["models"][0] | {"path": "/elsewhere", "gpus_per_model": 4}]
    assert ids(plan(models=moved)) == before
    fewer = ids(plan({"pathways": ["video_to_last"], "center_layers": [2]}))
    assert fewer.items() <= before.items()


@pytest.mark.parametrize(
    "changed",
    [
        plan(info=replace(INFO, digest="d2")),
        plan(models=[RAW["models"][0] | {"dtype": "float32"}]),
        plan(models=[RAW["models"][0] | {"system_prompt": "You see."}]),
        plan(samples=[*WORLD[:-1], replace(WORLD[-1], answer=3)]),
        plan(execution={"byte_budget": 1 << 20}),
        plan({"option_span": "full"}),
        plan({"windows": [5]}),
    ],
)
def test_whatever_can_change_a_number_changes_every_job_id(changed: Plan) -> None:
    assert not set(ids(changed).values()) & set(ids(plan()).values())


def test_a_redefined_pathway_is_another_job() -> None:
    own = {"layout": "single_video", "sources": ["audio"], "targets": ["last"]}
    chosen = {"pathways": ["video_to_last"]}
    redefined = plan(chosen, pathways=[own | {"name": "video_to_last"}])
    assert redefined.units[0].curves[0].pathway.sources == ("audio",)
    assert not set(ids(redefined).values()) & set(ids(plan(chosen)).values())


def test_golden_job_ids() -> None:
    """Results already stored are found again by these. A change needs a new IDENTITY_VERSION."""
    built = plan({"pathways": ["video_to_last"], "center_layers": [2], "tasks": ["sight"]})
    (job,) = built.jobs()
    assert job.job_id == "496f20c03a7c1c92b7c55f167b55d393"
    assert [unit.unit_id for unit in built.units] == [f"tiny/world/sight-{n}" for n in (0, 1, 2)]


def test_the_resolved_config_gives_the_same_plan() -> None:
    built = plan(execution={"limit": 2})
    resolved = SweepConfig.model_validate_json(built.config.model_dump_json())
    left = re.findall(r"^\W*(\w+): all$", to_yaml(built.config), re.MULTILINE)
    assert set(left) <= {"center_layers"}  # what is meant by a word is written out
    loaded = LoadedDataset(root=Path("/y"), samples=WORLD, fingerprint=fingerprint(WORLD))
    again = build_plan(resolved, {"world": loaded}, {"tiny": INFO})
    assert ids(again) == ids(built)
    assert again.config == built.config
    assert again.counts() == built.counts()


def test_a_recorded_sweep_is_refused_on_another_checkpoint() -> None:
    recorded = plan().config.identity
    assert recorded is not None
    written = {"identity": recorded.model_dump(mode="json")}
    assert ids(plan(**written)) == ids(plan())
    with pytest.raises(IdentityMismatch, match=r'models\.tiny: "d2" here, "d1" there'):
        plan(info=replace(INFO, digest="d2"), **written)
    with pytest.raises(IdentityMismatch, match=r"datasets\.world"):
        plan(samples=WORLD[:-1], **written)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (
            {"windows": [3, 7]},
            r"experiments\[0\]\.windows\[1\]: a window of 7 layers does not fit model 'tiny', "
            r"which has 6",
        ),
        ({"center_layers": [5, 6]}, r"center_layers\[1\]: model 'tiny' has no layer 6; .* 0 to 5"),
        ({"tasks": ["sihgt"]}, r"unknown task 'sihgt'; did you mean 'sight'\? known: sight, sound"),
        ({"tasks": ["sight"], "pathways": ["cross_candidate"]}, "selects nothing"),
    ],
)
def test_what_does_not_fit_is_refused(experiment: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(experiment)


def test_a_big_sweep_is_planned_in_seconds() -> None:
    models = [
        {"name": f"m{n}", "family": "qwen2_5_omni", "path": "testbed", "dtype": "bfloat16"}
        for n in range(4)
    ]
    samples = [clip(n, f"task{n % 20}", "why " * (n % 50)) for n in range(4_000)]
    start = time.perf_counter()
    built = plan(
        {"windows": [1, 3, 7]},
        samples=samples,
        info=replace(INFO, n_layers=36),
        models=models,
    )
    jobs = sum(1 for _ in built.jobs())
    seconds = time.perf_counter() - start
    print(f"{jobs} jobs, {len(built.units)} units in {seconds:.1f} s")
    assert jobs == 4 * 20 * 22 * 3 * 36 == 190_080
    assert seconds < 30  # 5 s on an idle core
