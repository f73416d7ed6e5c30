"""The driver is killed at any moment: what was stored is whole, and the next run does the rest."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from kill_steps import harness
from tiny_sweep import write_sweep

SIGKILLED = -9
Steps = Callable[[Sequence[dict[str, str]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steps]:
    """Run steps, one after the other, in one harness; see there."""
    config = write_sweep(tmp_path_factory.mktemp("kill"))
    with harness(config) as run:
        yield lambda wanted: [run(step) for step in wanted]


@pytest.fixture(scope="module")
def undisturbed(steps: Steps, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody kills does."""
    (step,) = steps([{"run": str(tmp_path_factory.mktemp("undisturbed"))}])
    assert step["ended"] == 0
    assert sorted(step["curves"]) == sorted(step["stored"])
    return step


def check_killed_and_resumed(
    steps: Steps, undisturbed: dict[str, Any], root: Path, moments: Sequence[str]
) -> None:
    """Kill at each moment in a folder of its own, and run the same command again."""
    wanted = []
    for moment in moments:
        run = str(root / moment.replace(":", "-"))
        wanted += [{"run": run, "at": moment}, {"run": run}]
    done = steps(wanted)
    for moment, killed, resumed in zip(moments, done[::2], done[1::2], strict=True):
        assert killed["ended"] == SIGKILLED, moment
        assert resumed["ended"] == 0, moment
        kept, rerun = set(killed["stored"]), resumed["curves"]
        assert len(rerun) == len(set(rerun)), moment
        assert not kept & set(rerun), f"{moment}: what was stored ran again"
        assert kept | set(rerun) == set(undisturbed["stored"]), moment
        assert resumed["cells"] == undisturbed["cells"], moment


def test_killed_while_loading_midway_and_in_a_commit(
    steps: Steps, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    in_a_commit = undisturbed["moments"]["torn"] - 2  # the first ones write the plan
    moments = ["load:1", "curve:10", f"torn:{in_a_commit}"]
    check_killed_and_resumed(steps, undisturbed, tmp_path, moments)


@pytest.mark.slow
def test_killed_at_thirty_seeded_moments(
    steps: Steps, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(2606)
    passed = {kind: n for kind, n in undisturbed["moments"].items() if kind != "load"}
    everywhere = [f"{kind}:{n}" for kind, times in passed.items() for n in range(1, times + 1)]
    one_a_kind = [f"{kind}:{rng.randint(1, times)}" for kind, times in passed.items()]
    rest = sorted(set(everywhere) - set(one_a_kind))
    moments = ["load:1", *one_a_kind, *rng.sample(rest, 29 - len(one_a_kind))]
    check_killed_and_resumed(steps, undisturbed, tmp_path, moments)


@pytest.mark.slow
def test_killed_again_and_again_it_still_arrives(
    steps: Steps, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    moments = ["decode:2", "curve:3", "torn:5", "renamed:5", "fsync:7", "load:1"]
    run = str(tmp_path / "run")
    *killed, last = steps([{"run": run, "at": moment} for moment in moments] + [{"run": run}])
    assert [step["ended"] for step in killed] == [SIGKILLED] * len(moments)
    assert last["ended"] == 0
    assert last["cells"] == undisturbed["cells"]


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_drains_commits_and_says_so(
    steps: Steps, undisturbed: dict[str, Any], tmp_path: Path, name: str, status: int
) -> None:
    run = str(tmp_path / "run")
    stopped, resumed = steps([{"run": run, "signal": name, "at": "curve:2"}, {"run": run}])
    assert stopped["ended"] == status
    assert set(stopped["stored"]) == set(stopped["curves"]), "all that came out was committed"
    assert 0 < len(stopped["stored"]) < len(undisturbed["stored"])
    assert not set(stopped["stored"]) & set(resumed["curves"])
    assert resumed["ended"] == 0
    assert resumed["cells"] == undisturbed["cells"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_on_ray_that_is_killed_or_stopped_leaves_nothing_behind(
    steps: Steps, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    on_ray = {"run": str(tmp_path / "run"), "executor": "ray"}
    killed, stopped, last = steps(
        [
            on_ray | {"at": "curve:12"},
            on_ray | {"at": "curve:2", "signal": "INT"},
            on_ray,
        ]
    )
    assert [step["ended"] for step in (killed, stopped, last)] == [SIGKILLED, 130, 0]
    assert [step["outlived_by"] for step in (killed, stopped, last)] == [[], [], []]
    assert set(stopped["curves"]) <= set(stopped["stored"]), "Ctrl-C did not reach the workers"
    assert not set(stopped["stored"]) & set(last["curves"])
    assert last["cells"] == undisturbed["cells"]
