"""How the orchestrator holds up: `python benchmarks/scale.py [plan|query|overhead|thousand]`.

No model and no Ray: what is measured is planning, the coordinator with its queue and store, and the
reading of results. `overhead` runs the real coordinator against workers that only sleep, their
unit times drawn from a recorded run (or given); `thousand` runs the same coordinator on a clock
that jumps from event to event, with deaths at a stated rate.
"""

import argparse
import json
import logging
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from simulated import Clock, Discarding, Jumping, Simulated, coordinate, made_up, sample_done

from avflow.datasets.prompts import option_list
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.parts import serialise
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.plan_tables import plan_tables
from avflow.orchestrator.results import query, read
from avflow.orchestrator.run_folder import claim
from avflow.orchestrator.store import ResultStore

LAYERS = 36
INFO: Any = SimpleNamespace(
    n_layers=LAYERS, hidden_size=2048, n_heads=16, n_kv_heads=2, head_size=128,
    intermediate_size=11008, vocab_size=151936, parameters=3e9, digest="d",
)  # fmt: skip


# -- a plan of any size ----------------------------------------------------------------------


def make_plan(tasks: int, samples_a_task: int, windows: Sequence[int]) -> Plan:
    samples = tuple(
        Sample(
            sample_id=f"task{task:03d}-{n:05d}",
            dataset="world",
            task=f"task{task:03d}",
            category="c",
            layout="single_video",
            parts=(
                MediaPart(kind="video", path=f"{task}-{n}.mp4", with_audio=True),
                TextPart(role="question", text="Which of them?"),
                *option_list(["one", "two", "three", "four"]),
            ),
            answer=n % 4,
            media_group=f"{task}-{n}",
        )
        for task in range(tasks)
        for n in range(samples_a_task)
    )
    raw = {
        "name": "scale",
        "models": [{"name": "m", "family": "qwen2_5_omni", "path": "testbed"}],
        "datasets": [{"name": "world", "reader": "testbed"}],
        "experiments": [{"name": "e", "windows": list(windows)}],
    }
    config = SweepConfig.model_validate_json(json.dumps(raw))
    loaded = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    return build_plan(config, {"world": loaded}, {"m": INFO})


def plan_100k() -> dict[str, Any]:
    """100,000 jobs and 10 million cells, enumerated and written."""
    before = peak_mb()
    began = time.perf_counter()
    plan = make_plan(tasks=80, samples_a_task=100, windows=(3, 7))
    planned = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        size = sum(len(serialise(table)) for _, table in plan_tables(RunPaths(Path(folder)), plan))
        written = time.perf_counter() - began
    counts = plan.counts()
    return {
        "jobs": counts.jobs,
        "cells": counts.cells,
        "units": counts.units,
        "plan_s": round(planned, 2),
        "tables_s": round(written, 2),
        "tables_mb": round(size / 1e6, 1),
        "memory_mb": round(peak_mb() - before),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- ten million rows ------------------------------------------------------------------------


def query_10m(rows: int = 10_000_000) -> dict[str, Any]:
    """The curve of one pathway out of that many cells, in parts as large as `compact` leaves."""
    cells_a_task = make_plan(tasks=8, samples_a_task=1, windows=(3,)).counts().cells // 8
    plan = make_plan(tasks=8, samples_a_task=math.ceil(rows / 8 / cells_a_task), windows=(3,))
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder) / "run")
        claim(paths, plan)
        store = ResultStore(paths, plan)
        rng = np.random.default_rng(0)
        began, stored = time.perf_counter(), 0
        for at, unit in enumerate(plan.units):
            for curve in unit.curves:
                store.add_curve(unit, made_up(unit, curve, rng))
                stored += len(curve.center_layers)
            store.add_sample(unit, sample_done(unit), worker="h:1", attempt=1)
            if at % 600 == 599:
                store.commit()
        store.commit()
        write_s = time.perf_counter() - began
        sql = (
            "SELECT center_layer, AVG(delta) AS d, COUNT(*) AS n FROM cells "
            "WHERE pathway = 'video_to_question' AND task = 'task003' GROUP BY center_layer"
        )
        return {
            "rows": stored,
            "write_s": round(write_s, 1),
            "rows_a_second": round(stored / write_s),
            "sql_s": best(lambda: query(paths.root, sql)),
            "whole_table_s": best(lambda: read(paths.root), 1),
            "parts": len(list(paths.root.glob("cells/**/*.parquet"))),
        }


def best(call: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(min(seconds), 3)


def drawn(plan: Plan, run: str | None, mean_s: float) -> dict[str, float]:
    """Each unit's seconds, as a recorded run's samples took them, scaled to a mean; else
    log-normal."""
    rng = random.Random(1)
    if run is None:
        return {unit.unit_id: rng.lognormvariate(0, 0.5) * mean_s / 1.133 for unit in plan.units}
    samples = read(run, "samples")
    parts = ("encode_s", "prefill_s", "replay_s")
    seconds = samples.select(pl.sum_horizontal(*parts)).to_series().to_list()
    scale = mean_s / (sum(seconds) / len(seconds))
    return {unit.unit_id: rng.choice(seconds) * scale for unit in plan.units}


def overhead_64(run: str | None) -> dict[str, Any]:
    """The real coordinator, store included, in real time: how long workers wait for it."""
    plan = make_plan(tasks=8, samples_a_task=48, windows=(3,))
    clock = Clock()
    executor = Simulated(64, drawn(plan, run, 4.0), clock)
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder) / "run")
        claim(paths, plan)
        cpu = time.process_time()
        _, took = coordinate(plan, executor, ResultStore(paths, plan), clock)
        cpu = time.process_time() - cpu
    counts = plan.counts()
    return {
        "workers": 64,
        "units": counts.units,
        "cells": counts.cells,
        "mean_unit_s": round(executor.busy_s / counts.units, 2),
        "makespan_s": round(took, 2),
        "coordinator_cpu_s": round(cpu, 2),
        "coordinator_cpu_percent_of_worker_time": round(100 * cpu / executor.busy_s, 2),
        "workers_waited_percent": round(100 * executor.idle_s / executor.busy_s, 2),
        "driver_busy_percent": round(100 * (1 - executor.waited_s / took), 1),
    }


def thousand(
    run: str | None, deaths_an_hour: float, guess: float | None, samples: int = 10_000
) -> dict[str, Any]:
    """1,000 workers that die at a stated rate: makespan against the ideal without deaths.

    Long units are given out first, as far as the plan's costs know which are long: they are off
    by a log-normal factor of `guess`; None: they say nothing.
    """
    logging.disable(logging.ERROR)  # a line a death
    plan = make_plan(tasks=20, samples_a_task=samples // 20, windows=(3,))
    seconds, rng = drawn(plan, run, 60.0), random.Random(2)
    units = tuple(
        replace(
            unit,
            curves=unit.curves[:4],
            wanted=frozenset(curve.key for curve in unit.curves[:4]),
            cost=1.0 if guess is None else seconds[unit.unit_id] * rng.lognormvariate(0, guess),
        )
        for unit in plan.units
    )
    plan = replace(plan, units=units)
    clock = Jumping()
    executor = Simulated(1000, seconds, clock, load_s=60.0, deaths_an_hour=deaths_an_hour)
    began = time.perf_counter()
    outcome, makespan = coordinate(plan, executor, Discarding(), clock)
    ideal, all_s = executor.busy_s / 1000 + 60.0, makespan * 1000
    idle_s = all_s - executor.busy_s - executor.loading_s - executor.lost_s
    return {
        "workers": 1000,
        "units": len(units),
        "costs_off_by": guess,
        "deaths_an_hour_and_worker": deaths_an_hour,
        "deaths": executor.deaths,
        "failed_for_good": outcome.failures,
        "given_up": dict(outcome.given_up),
        "makespan_s": round(makespan),
        "ideal_s": round(ideal),
        "over_ideal_percent": round(100 * (makespan / ideal - 1), 1),
        "longest_unit_s": round(max(seconds.values())),
        "percent_of_worker_time": {
            "work": round(100 * executor.busy_s / all_s, 1),
            "loading": round(100 * executor.loading_s / all_s, 1),
            "lost_with_the_dead": round(100 * executor.lost_s / all_s, 1),
            "waiting_for_the_coordinator": round(100 * executor.idle_s / all_s, 1),
            "nothing_left_to_do": round(100 * (idle_s - executor.idle_s) / all_s, 1),
        },
        "simulated_in_s": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["plan", "query", "overhead", "thousand"])
    parser.add_argument("--recorded", help="a run folder whose samples' seconds are drawn from")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--deaths", type=float, default=0.1, help="an hour and worker")
    arguments = parser.parse_args()
    run, deaths = arguments.recorded, arguments.deaths
    benchmarks: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "plan": [plan_100k],
        "query": [lambda: query_10m(arguments.rows)],
        "overhead": [lambda: overhead_64(run)],
        "thousand": [
            lambda: thousand(run, deaths, None),
            lambda: thousand(run, deaths, 0.3),
            lambda: thousand(run, 0.0, 0.3),
            lambda: thousand(run, deaths, 0.3, samples=30_000),
        ],
    }
    for what in arguments.what:
        for benchmark in benchmarks[what]:
            print(json.dumps({"benchmark": what, **benchmark()}), flush=True)
    print(json.dumps({"python": sys.version.split()[0], "polars": pl.__version__,
                      "pyarrow": pa.__version__}))  # fmt: skip


if __name__ == "__main__":
    main()
