"""The queue and the policy, event by event: who gets what, and what a failure means."""

import pickle

import pytest
from queued_units import failed, keys, lease, run, unit

from avflow.orchestrator import errors
from avflow.orchestrator.policy import (
    Action,
    Budgets,
    Decision,
    FailureKind,
    FailurePolicy,
    classify,
)
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.unit import UnitState

# -- giving work -----------------------------------------------------------------------------


def test_the_costliest_unit_goes_first_and_a_worker_holds_two() -> None:
    queue = WorkQueue([unit("cheap", cost=1), unit("dear", cost=9), unit("middle", cost=5)])
    assert [lease(queue).unit_id, lease(queue).unit_id] == ["dear", "middle"]
    assert queue.next_for("w", "m", 0.0) is None
    assert queue.in_flight("w") == ("dear", "middle")
    assert lease(queue, "another").unit_id == "cheap"


def test_a_worker_is_bound_to_one_model() -> None:
    queue = WorkQueue([unit("a", model="m"), unit("b", model="n")])
    assert lease(queue).model == "m"
    assert queue.next_for("w", "m", 0.0) is None
    with pytest.raises(ValueError, match="bound to m"):
        queue.next_for("w", "n", 0.0)
    assert (queue.due("m"), queue.due("n")) == (0, 1)


def test_a_unit_can_not_be_queued_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        WorkQueue([unit("a"), unit("a")])


def test_a_drained_queue_gives_nothing_more_and_finishes_with_what_flies() -> None:
    queue = WorkQueue([unit("a"), unit("b")])
    spec = lease(queue)
    queue.drain()
    assert queue.next_for("w", "m", 0.0) is None
    assert not queue.finished
    run(queue, spec)
    assert queue.finished
    assert queue.counts().pending == 1


# -- what comes out --------------------------------------------------------------------------


def test_a_unit_runs_to_its_end() -> None:
    queue = WorkQueue([unit("a")])
    run(queue, lease(queue))
    assert queue.finished
    assert queue.state("a") is UnitState.DONE
    assert queue.counts().curves_done == 3


def test_nothing_is_stored_twice_nor_from_a_worker_that_does_not_hold_the_unit() -> None:
    queue = WorkQueue([unit("a")])
    spec = lease(queue)
    key = keys(spec)[0]
    assert not queue.on_curve("stranger", "a", key, 0.0)
    assert queue.on_curve("w", "a", key, 0.0)
    assert not queue.on_curve("w", "a", key, 0.0)
    assert not queue.on_curve("w", "a", "no_such/k3/letter", 0.0)


def test_a_wrong_baseline_skips_its_curves() -> None:
    queue = WorkQueue([unit("a"), unit("b", correct_only=False)])
    by_id = {spec.unit_id: spec for spec in (lease(queue), lease(queue))}
    assert queue.on_sample_done("w", "a", correct=False, now=0.0) == []
    for key in keys(by_id["b"]):
        assert queue.on_curve("w", "b", key, 0.0)
    assert queue.on_sample_done("w", "b", correct=False, now=0.0) == []
    assert (queue.counts().curves_skipped, queue.counts().curves_done) == (3, 3)
    assert queue.counts().done == 2


def test_a_curve_that_a_worker_forgets_is_a_failure_not_a_loss() -> None:
    queue = WorkQueue([unit("a")])
    first, *_ = keys(lease(queue))
    queue.on_curve("w", "a", first, 0.0)
    decisions = queue.on_sample_done("w", "a", correct=True, now=0.0)
    assert decisions is not None
    assert [d.failure.error for d in decisions] == ["MissingCurve"] * 2
    assert all(d.terminal for d in decisions)
    assert queue.state("a") is UnitState.FAILED


# -- failures --------------------------------------------------------------------------------


def test_a_curve_that_raises_is_quarantined_and_the_rest_goes_on() -> None:
    queue = WorkQueue([unit("a")])
    one, two, three = keys(lease(queue))
    decision = queue.on_failure("w", failed("a", one), 0.0)
    assert decision is not None
    assert (decision.action, decision.curves) == (Action.QUARANTINE, (one,))
    assert queue.on_failure("w", failed("a", one), 0.0) is None
    assert queue.on_curve("w", "a", two, 0.0)
    assert queue.on_curve("w", "a", three, 0.0)
    assert queue.on_sample_done("w", "a", correct=True, now=0.0) == []
    assert queue.state("a") is UnitState.FAILED
    assert queue.finished


def test_a_transient_failure_comes_back_with_what_is_missing_alone() -> None:
    queue = WorkQueue([unit("a")])
    one, two, three = keys(lease(queue))
    decision = queue.on_failure("w", failed("a", two, retryable=True), 0.0)
    assert decision is not None
    assert decision.action is Action.RETRY
    queue.on_curve("w", "a", one, 0.0)
    queue.on_curve("w", "a", three, 0.0)
    assert queue.on_sample_done("w", "a", correct=True, now=0.0) == []
    again = lease(queue)
    assert again.wanted == {two}
    assert len(again.curves) == 3  # batches follow from all the plan holds
    assert queue.attempt("a") == 2
    run(queue, again)
    assert queue.state("a") is UnitState.DONE


def test_gpu_memory_halves_the_batch() -> None:
    queue = WorkQueue([unit("a", 1)])
    budgets = []
    while not queue.finished:
        spec = lease(queue)
        budgets.append(spec.byte_budget)
        queue.on_failure("w", failed("a", None, error="OutOfMemoryError", retryable=True), 0.0)
    assert budgets == [1 << 20 >> n for n in range(5)]
    assert queue.state("a") is UnitState.FAILED


def test_after_host_memory_ran_out_a_unit_is_alone_in_its_worker() -> None:
    queue = WorkQueue([unit("a", cost=3), unit("b", cost=2), unit("c", cost=1)])
    assert [lease(queue).unit_id, lease(queue).unit_id] == ["a", "b"]
    queue.on_worker_death("w", FailureKind.HOST_MEMORY, "killed", 0.0)
    assert lease(queue, "w2").unit_id == "a"
    assert queue.next_for("w2", "m", 0.0) is None
    assert lease(queue, "w3").unit_id == "b"


def test_a_sample_that_fails_whole_ends_its_curves() -> None:
    queue = WorkQueue([unit("a")])
    spec = lease(queue)
    decision = queue.on_failure("w", failed("a", None), 0.0)
    assert decision is not None
    assert decision.terminal
    assert decision.curves == tuple(sorted(spec.wanted))
    assert queue.finished
    assert queue.counts().curves_failed == 3


# -- deaths ----------------------------------------------------------------------------------


def test_a_death_is_blamed_on_the_oldest_unit_s_first_missing_curve_alone() -> None:
    queue = WorkQueue([unit("a", cost=2), unit("b", cost=1)])
    spec = lease(queue)
    lease(queue)
    one, two, _ = keys(spec)
    queue.on_curve("w", "a", one, 0.0)
    (decision,) = queue.on_worker_death("w", FailureKind.WORKER_DEATH, "killed by SIGKILL", 0.0)
    assert decision.failure.curve == two
    assert decision.action is Action.RETRY
    assert lease(queue, "w2").wanted == set(keys(spec)[1:])
    assert len(lease(queue, "w2").wanted) == 3


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_poison_curve_is_found_wherever_it_comes_out_and_the_rest_is_run(place: int) -> None:
    """Workers may yield in another order than the plan's: here backwards."""
    queue = WorkQueue([unit("a")])
    poison = keys(unit("a"))[place]
    decisions: list[Decision] = []
    for attempt in range(20):
        if queue.finished:
            break
        worker = f"w{attempt}"
        spec = lease(queue, worker)
        for key in reversed(keys(spec)):
            if key == poison:
                kind = FailureKind.WORKER_DEATH
                decisions += queue.on_worker_death(worker, kind, "segmentation fault", 0.0)
                break
            assert queue.on_curve(worker, "a", key, 0.0)
        else:
            queue.on_sample_done(worker, "a", correct=True, now=0.0)
    assert queue.finished
    assert [d.curves for d in decisions if d.terminal] == [(poison,)]
    assert queue.counts().curves_done == 2
    assert len(decisions) <= 5


def test_a_sample_that_kills_before_any_curve_is_given_up_whole() -> None:
    queue = WorkQueue([unit("a", 20)])
    deaths = 0
    while not queue.finished:
        lease(queue, f"w{deaths}")
        queue.on_worker_death(f"w{deaths}", FailureKind.WORKER_DEATH, "killed", 1000.0 * deaths)
        deaths += 1
    assert deaths == 7
    assert queue.state("a") is UnitState.FAILED
    assert queue.counts().curves_failed == 20


def test_preemption_costs_nobody_a_try() -> None:
    queue = WorkQueue([unit("a")])
    for n in range(50):
        lease(queue, f"w{n}")
        assert queue.on_worker_death(f"w{n}", FailureKind.PREEMPTION, "spot", 0.0) == []
    run(queue, lease(queue))
    assert queue.state("a") is UnitState.DONE


def test_machines_that_go_by_the_rack_give_no_model_up() -> None:
    queue = WorkQueue([unit(f"u{n:02}") for n in range(40)])
    held = [lease(queue, f"w{n}").unit_id for n in range(40)]
    lost = FailureKind.NODE_LOST
    actions = [
        [decision.action for decision in queue.on_worker_death(f"w{n}", lost, "gone", 0.0)]
        for n in range(40)
    ]
    assert actions == [[Action.RETRY]] * 40
    assert queue.due("m") == 40
    assert keys(lease(queue)) == keys(unit(held[0])), "nor is anything leased curve by curve"


def test_what_takes_every_machine_down_ends_at_last() -> None:
    queue = WorkQueue([unit("a")])
    decisions = []
    while not queue.finished:
        spec = lease(queue, f"w{len(decisions)}")
        decisions += queue.on_worker_death(f"w{len(decisions)}", FailureKind.NODE_LOST, "gone", 0.0)
        if decisions[-1].terminal:
            break
    assert len(decisions) == Budgets().node_lost
    assert decisions[-1].curves == (keys(spec)[0],)
    assert queue.due("m") == 1, "its other curves are still due"


def test_a_hang_is_overdue_and_silence_counts_from_the_last_sign_of_life() -> None:
    queue = WorkQueue([unit("a")], deadline_s=10.0)
    spec = lease(queue, now=100.0)
    queue.on_curve("w", "a", keys(spec)[0], 105.0)
    assert queue.overdue(115.0) == []
    assert queue.overdue(115.1) == ["w"]
    (decision,) = queue.on_timeout("w", 116.0)
    assert decision.failure.stage == "timeout"
    assert queue.overdue(1e9) == []


def test_the_breaker_trips_on_many_samples_not_on_one_poisonous_one() -> None:
    queue = WorkQueue([unit(f"u{n}", cost=100 - n) for n in range(20)])
    actions = []
    for n in range(6):
        lease(queue, f"w{n}")
        # Another unit is on top each time, as the one that died goes to the end of another worker.
        lease(queue, f"idle{n}")
        decisions = queue.on_worker_death(f"w{n}", FailureKind.WORKER_DEATH, "broken GPU", float(n))
        actions += [d.action for d in decisions]
    assert Action.ABORT_MODEL not in actions  # six units, but six live workers too
    for n in range(6):
        decisions = queue.on_worker_death(f"idle{n}", FailureKind.WORKER_DEATH, "broken", 10.0)
        actions += [d.action for d in decisions]
    assert actions.count(Action.ABORT_MODEL) == 1
    assert queue.finished
    assert queue.counts().abandoned > 0


def test_a_model_that_can_not_load_is_given_up_and_the_others_go_on() -> None:
    queue = WorkQueue([unit("a", model="m"), unit("b", model="n")])
    assert queue.on_load_failure("n", FailureKind.LOAD, "no such file").action is Action.RETRY
    assert queue.on_load_failure("n", FailureKind.LOAD, "no such file").action is Action.ABORT_MODEL
    assert queue.state("b") is UnitState.ABANDONED
    run(queue, lease(queue))
    assert queue.finished


# -- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_kind_has_a_last_word(kind: FailureKind) -> None:
    policy = FailurePolicy()
    actions = [policy.decide(kind, tries) for tries in range(1, 12)]
    if kind is FailureKind.PREEMPTION:
        assert set(actions) == {Action.RETRY}
    else:
        assert actions[-1] in (Action.QUARANTINE, Action.ABORT_MODEL, Action.ABORT_SWEEP)


def test_budgets_are_separate_and_positive() -> None:
    policy = FailurePolicy(budgets=Budgets(worker_death=1, transient=4))
    assert policy.decide(FailureKind.WORKER_DEATH, 1) is Action.QUARANTINE
    assert policy.decide(FailureKind.TRANSIENT, 3) is Action.RETRY
    with pytest.raises(ValueError, match="timeout"):
        Budgets(timeout=0)


def test_failures_as_data_are_told_apart() -> None:
    assert classify(failed("a", None)) is FailureKind.EXCEPTION
    assert classify(failed("a", None, retryable=True)) is FailureKind.TRANSIENT
    assert classify(failed("a", None, error="OutOfMemoryError")) is FailureKind.GPU_MEMORY
    assert classify(failed("a", None, error="MemoryError")) is FailureKind.HOST_MEMORY


def test_every_error_of_ours_survives_pickle() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) >= 6
    for kind in classes:
        again = pickle.loads(pickle.dumps(kind("what", "where")))
        assert type(again) is kind
        assert again.args == ("what", "where")
        assert again.exit_status == kind("").exit_status


def test_questions_about_one_video_go_to_the_worker_that_has_it() -> None:
    """Its encoders' outputs are still there; a worker whose video has no more takes the next."""
    specs = [unit(f"{media}{i}", media=media, cost=9 - i) for i in range(3) for media in "abc"]
    queue = WorkQueue(specs, in_flight=1)
    taken: dict[str, list[str]] = {"one": [], "two": []}
    for turn in range(9):
        worker = ("one", "two")[turn % 2]
        spec = lease(queue, worker)
        taken[worker].append(spec.unit_id)
        run(queue, spec, worker)
    assert taken == {"one": ["a0", "a1", "a2", "c0", "c2"], "two": ["b0", "b1", "b2", "c1"]}
    assert queue.finished
