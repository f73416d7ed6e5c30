"""In the queue, an intervention or a probe lives as a curve does."""

from dataclasses import replace

from queued_units import keys, lease, unit

from avflow.orchestrator.policy import Action, FailureKind
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.unit import UnitState
from avflow.workers.protocol import DiscardSpec, ProbeSpec, UnitSpec

EXTRAS = (
    DiscardSpec(name="full", steps=()),
    ProbeSpec(name="norms", layers=(0,), correct_only=True),
)


def with_extras(name: str, curves: int = 1) -> UnitSpec:
    plain = unit(name, curves, correct_only=True)
    wanted = plain.wanted | {spec.key for spec in EXTRAS}
    return replace(plain, extras=EXTRAS, wanted=wanted)


def test_a_wrong_answer_skips_what_only_a_right_one_calls_for() -> None:
    queue = WorkQueue([with_extras("a")])
    lease(queue)
    assert queue.on_curve("w", "a", "discard/full", 0.0)
    assert not queue.on_curve("w", "a", "discard/full", 0.0), "once"
    assert queue.on_sample_done("w", "a", correct=False, now=0.0) == []
    assert queue.state("a") is UnitState.DONE
    counts = queue.counts()
    assert (counts.curves_done, counts.curves_skipped) == (1, 2)


def test_a_worker_that_forgets_one_is_to_blame() -> None:
    queue = WorkQueue([with_extras("a", curves=0)])
    lease(queue)
    assert queue.on_curve("w", "a", "probe/norms", 0.0)
    (decision,) = queue.on_sample_done("w", "a", correct=True, now=0.0) or []
    assert decision.failure.curve == "discard/full"
    assert decision.failure.error == "MissingCurve"


def test_a_death_is_blamed_on_the_first_that_did_not_come_out() -> None:
    queue = WorkQueue([with_extras("a")])
    spec = lease(queue)
    assert queue.on_curve("w", "a", keys(spec)[0], 0.0)
    (decision,) = queue.on_worker_death("w", FailureKind.WORKER_DEATH, "gone", 0.0)
    assert decision.failure.curve == "discard/full"
    assert decision.action is Action.RETRY
    again = lease(queue, "v")
    assert again.wanted == {"discard/full", "probe/norms"}
    assert again.extras == EXTRAS


def test_two_deaths_and_each_has_to_kill_alone() -> None:
    queue = WorkQueue([with_extras("a", curves=0)])
    for number in range(2):
        lease(queue, f"w{number}")
        queue.on_worker_death(f"w{number}", FailureKind.WORKER_DEATH, "gone", 0.0)
    assert lease(queue, "w2").wanted == {"discard/full"}
