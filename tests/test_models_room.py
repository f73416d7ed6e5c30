"""A card that is too small for one of a sweep's models: that one is given up, with the numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from in_process import avflow
from tiny_sweep import write_sweep

from avflow.orchestrator import sweep
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.errors import ExitStatus
from avflow.orchestrator.executors import LocalExecutor
from avflow.orchestrator.load import load
from avflow.orchestrator.memory import needs
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import read, standing_failures
from avflow.orchestrator.sweep import plan_sweep, run_sweep
from avflow.workers.actor import ModelWorker
from avflow.workers.models import describe, longest_prompt_of
from avflow.workers.models.room import check_room


class OnACard(ModelWorker):
    """Does what loading on a GPU does first, and loads on the CPU."""

    def __init__(self, name: str, spec: Any, _devices: Any, threads: int) -> None:
        check_room(spec, describe(spec), longest_prompt_of(spec), ("cuda:0",))
        super().__init__(name, spec, ("cpu",), threads)


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    """Two models: the second is the first with prompts that are a hundred times as long."""
    file = write_sweep(tmp_path, executor="local")
    raw = yaml.safe_load(file.read_text())
    raw["models"].append(raw["models"][0] | {"name": "large", "max_frames": 12_800})
    file.write_text(yaml.safe_dump(raw))
    return load(file)


def give_card(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (size, size))
    monkeypatch.setattr(sweep, "LocalExecutor", partial(LocalExecutor, worker_class=OnACard))


def test_a_card_too_small_for_one_model_ends_its_jobs_and_not_the_sweep(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sweep(config)
    small, large = (need.peak for need in needs(config, plan.models))
    card = (small + large) // 2
    give_card(monkeypatch, card)
    outcome = run_sweep(config, tmp_path / "run", progress=Silent())
    assert outcome.exit_status == ExitStatus.WITH_FAILURES
    two_numbers = (f"needs {large / 2**30:.1f} GiB", f"has {card / 2**30:.1f} GiB")
    assert len({*two_numbers, f"needs {card / 2**30:.1f} GiB"}) == 3, "far enough apart to tell"
    assert all(number in outcome.summary for number in two_numbers)
    measured = read(tmp_path / "run", "samples")
    assert set(measured["model"]) == {"tiny"}
    assert measured.height == 4
    (failure,) = standing_failures(tmp_path / "run").iter_rows(named=True)
    assert (failure["model"], failure["unit_id"], failure["kind"]) == ("large", None, "unsupported")
    said = avflow("failures", str(tmp_path / "run")).stdout
    assert "large (whole model)" in said
    assert all(number in said for number in two_numbers)
    assert said.splitlines()[-1] == (
        f"Models that were given up are tried again by: avflow resume {tmp_path / 'run'}"
    )
    give_card(monkeypatch, large)
    outcome = run_sweep(config, tmp_path / "run", progress=Silent())
    assert outcome.counts.ran == 4, "the other model's are done"
    assert standing_failures(tmp_path / "run").is_empty()
