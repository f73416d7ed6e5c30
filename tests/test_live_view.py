"""What is seen while a sweep runs: counts by state, how busy, and the same for Ray's dashboard."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from stored_run import make_plan, sample_done

from avflow.orchestrator.activity import WINDOW_S, Activity
from avflow.orchestrator.progress import Live, Plain, Snapshot

SNAPSHOT = Snapshot(
    units=10,
    units_done=3,
    units_failed=1,
    units_running=2,
    curves=40,
    curves_ended=16,
    failures=1,
    workers_ready=2,
    workers_loading=1,
    share=0.4,
    working_s=60,
    cells=500,
    model_busy=0.871,
    decoding=1.25,
    peak_bytes=1 << 30,
)


def test_a_line_says_counts_by_state_and_how_busy() -> None:
    out = io.StringIO()
    shown = Plain(out, every_s=0)
    shown.show(SNAPSHOT, 0.0)
    assert out.getvalue() == (
        "4/10 samples (2 running) · 16/40 curves · 1 failures · 2 workers (+1 loading), "
        "running 87% of the time, 1.2 decoding · ETA 1:30\n"
    )


def test_a_terminal_of_80_columns_shows_all_of_it() -> None:
    out = io.StringIO()
    shown = Live(Console(file=out, force_terminal=True, width=80))
    many = replace(
        SNAPSHOT, units=14_400, units_done=812, units_failed=0, units_running=16, curves=520_000,
        curves_ended=29_412, workers_ready=1000, share=0.05, working_s=1000,
    )  # fmt: skip
    shown.show(many, 0.0)
    shown.close()
    last = out.getvalue().rpartition("812/14400 samples (16 running)")[2]
    assert last.startswith(" · ETA 5:16:40")
    below = last.partition("\n")[2].replace("\n", " ")
    assert "29412/520000 curves · 1 failures · 1000 workers (+1 loading)" in below
    assert "running 87% of the time, 1.2 decoding" in below


def test_shares_are_of_the_last_minutes() -> None:
    activity = Activity()
    assert activity.shares(0.0, 2) == (None, 0.0)
    done = replace(
        sample_done(make_plan(1).units[0]), encode_s=1, prefill_s=2, replay_s=6, decode_s=3
    )
    for second in range(0, 60, 10):  # each sample took one of two workers for 9 of 10 s
        activity.add(done, float(second))
    busy, decoding = activity.shares(60.0, 2)
    assert busy == pytest.approx(0.45)
    assert decoding == pytest.approx(0.3)
    assert activity.shares(60.0, 1)[0] == pytest.approx(0.9)
    busy, decoding = activity.shares(60.0 + 2 * WINDOW_S, 2)
    assert (busy, decoding) == (0.0, 0.0), "nothing came out for long"
    assert activity.peak_bytes == done.peak_bytes


SCRAPED = """
import time, urllib.request
from avflow.orchestrator.cluster import start_ray
start_ray(None)
import ray
from test_live_view import SNAPSHOT
from avflow.orchestrator.metrics import Metered
from avflow.orchestrator.progress import Silent
metered = Metered(Silent(), "paper")
metered.show(SNAPSHOT, 0.0)
port = ray.nodes()[0]["MetricsExportPort"]
for _ in range(40):
    time.sleep(1)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    if "avflow_cells_total" in text:
        break
print(chr(10).join(line for line in text.splitlines() if "avflow" in line))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ray_s_metrics_hold_the_same_numbers() -> None:
    said = subprocess.run(
        [sys.executable, "-c", SCRAPED],
        env=os.environ
        | {"RAY_metrics_report_interval_ms": "500", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    lines = [line for line in said.splitlines() if 'sweep="paper"' in line]
    values = {}
    for line in lines:
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        state = next((part for part in labels.split(",") if part.startswith(("state", "of"))), "")
        values[name, state.partition("=")[2].strip('"')] = float(value)
    assert values["ray_avflow_units", "running"] == 2
    assert values["ray_avflow_units", "pending"] == 4
    assert values["ray_avflow_cells_total", ""] == 500
    assert values["ray_avflow_failures_total", ""] == 1
    assert values["ray_avflow_model_busy_share", ""] == pytest.approx(0.871)
    assert values["ray_avflow_memory_bytes", "worker"] == 1 << 30
