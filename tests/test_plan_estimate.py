"""`avflow plan` without data: the paper's counts, and the engine's own count of the work."""

import json
from pathlib import Path

import pytest
from tiny_sweep import write_sweep

from avflow.datasets.selections import AV_ODYSSEY, AV_SPEAKERBENCH, CQR, check_counts
from avflow.orchestrator.config import SweepConfig, load_config
from avflow.orchestrator.cost import nominal_layout
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.estimate import CARDS, Estimate, estimate, gpu_hours
from avflow.orchestrator.measure import measure
from avflow.orchestrator.nominal import NominalPlan, plan_anyway
from avflow.orchestrator.partial import only
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.sweep import plan_sweep
from avflow.orchestrator.views_plan import show_plan
from avflow.workers.engine.cost import plain_cost
from avflow.workers.engine.memory import shapes_of

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def paper() -> SweepConfig:
    return load_config(CONFIGS / "paper.yaml")


@pytest.fixture(scope="module")
def fig3(paper: SweepConfig) -> NominalPlan:
    return plan_anyway(only(paper, "fig3"))


def test_samples_are_as_many_as_the_paper_counts(paper: SweepConfig) -> None:
    whole = plan_anyway(only(paper, "table1")).plan
    samples = whole.datasets["av_speakerbench"].samples
    assert len(samples) == 3212
    assert all(row.good for row in check_counts(AV_SPEAKERBENCH, AV_SPEAKERBENCH.names(), samples))
    odyssey = plan_anyway(only(paper, "fig5")).plan.datasets["av_odyssey"].samples
    names = [name for name in AV_ODYSSEY.names() if AV_ODYSSEY.task(name).count]
    assert all(row.good for row in check_counts(AV_ODYSSEY, names, odyssey))
    knockout = set(AV_ODYSSEY.names("knockout"))
    assert sum(s.task in knockout and s.ordering == CQR for s in odyssey) == 1001


def test_what_is_not_there_is_said(fig3: NominalPlan) -> None:
    assert len(fig3.missing) == 2
    assert "counted from the paper's tables" in fig3.missing[1]
    counts = fig3.plan.counts()
    assert counts.units == 2081
    assert counts.cells == 2081 * 3 * 36
    assert counts.jobs == 8 * 3 * 36


def test_the_plain_way_is_one_forward_a_cell_and_a_baseline(fig3: NominalPlan) -> None:
    (found,) = estimate(fig3.plan).values()
    assert found.forwards == 2081 * (3 * 36 + 1)
    unit, model = fig3.plan.units[0], fig3.plan.config.models[0]
    layout = nominal_layout(unit.sample, model)
    assert layout is not None
    info = fig3.plan.models[model.name]
    one = plain_cost(shapes_of(info, info.head_size, layout.n_tokens, 2)).flops
    assert found.plain == pytest.approx(found.forwards * one)
    assert found.floor < found.shared < found.plain
    assert found.equivalents == pytest.approx(found.shared / one)


@pytest.mark.parametrize(
    ("changes", "pairs", "tokens"),
    [
        ({}, 20, 144),
        ({"frame_tokens": None}, 20, 768),
        ({"frame_tokens": 2000}, 20, 1196),  # of a picture of 1280x720 that is no larger
        ({"family": "video_salmonn2", "frame_tokens": None}, 20, 238),
        (
            {"family": "video_salmonn2", "frame_tokens": None, "max_frames": 768, "fps": 10},
            100,
            285,
        ),
        ({"fps": 0.01}, 1, 144),
    ],
)
def test_frames_are_as_large_as_the_model_would_have_them(
    fig3: NominalPlan, changes: dict[str, object], pairs: int, tokens: int
) -> None:
    model = fig3.plan.config.models[0].model_copy(update=changes)
    layout = nominal_layout(fig3.plan.units[0].sample, model)
    assert layout is not None
    frames = [s.stop - s.start for s in layout.segments if s.kind == "frame"]
    assert frames == [tokens] * pairs


def test_wrong_baselines_call_for_no_curve(fig3: NominalPlan) -> None:
    (right,), (none,) = estimate(fig3.plan).values(), estimate(fig3.plan, 0.0).values()
    (half,) = estimate(fig3.plan, 0.5).values()
    assert none.forwards == 2081
    assert half.shared == pytest.approx((right.shared + none.shared) / 2)


def test_hours_follow_from_the_card() -> None:
    assert gpu_hours(CARDS["H100"] * 3600, "H100", utilisation=0.5) == pytest.approx(2)
    with pytest.raises(ConfigError, match="A100"):
        gpu_hours(1, "abacus")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_sweep(load_config(write_sweep(tmp_path_factory.mktemp("tiny"))))


def test_a_model_that_is_not_planned_is_not_measured(tiny: Plan) -> None:
    with pytest.raises(ConfigError, match="unknown model 'tinny'; did you mean 'tiny'"):
        measure(tiny, "tinny")


def test_one_real_sample_calibrates(tiny: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(tiny, "tiny")
    assert found.replay_s > 0
    assert found.flops > 0
    total = sum(estimate(tiny).values(), Estimate())
    assert found.hours(total) > 0
    assert found.hours(total + total) == pytest.approx(2 * found.hours(total))
    show_plan(tiny, as_json=True, measured=found)
    shown = json.loads(capsys.readouterr().out)
    assert shown["measured"]["n_tokens"] == found.n_tokens
    assert shown["costs"][0]["cells"] == shown["cells"] == tiny.counts().cells
