"""MLflow's own server over a run's store: found by its link, and gone when it is stopped."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from avflow.orchestrator import ui
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.tracking import connect
from avflow.orchestrator.ui import ServerError, chart_link, serve

RAW = {
    "name": "a sweep",
    "models": [{"name": "tiny", "family": "qwen2_5_omni", "path": "testbed"}],
    "datasets": [{"name": "world", "reader": "testbed"}],
    "experiments": [{"name": "e"}],
}


def config(uri: str | None = None) -> SweepConfig:
    return SweepConfig.model_validate_json(json.dumps(RAW | {"mlflow": {"tracking_uri": uri}}))


def test_the_link_opens_the_charts() -> None:
    assert chart_link("http://127.0.0.1:5000/", "7") == (
        "http://127.0.0.1:5000/#/experiments/7/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART"
        "&searchFilter=tags.kind%20%3D%20%27cell%27"
    )


def test_a_run_without_a_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=f"avflow track {tmp_path}"):
        serve(RunPaths(tmp_path), config())


def test_a_taken_port_is_refused_if_asked_for_and_avoided_if_not() -> None:
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=str(port)):
            ui._free_port(port)
        assert ui._free_port(None) != port


SERVE = """
import json, sys
from pathlib import Path
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.ui import serve
config = SweepConfig.model_validate_json(sys.argv[2])
serve(RunPaths(Path(sys.argv[1])), config, say=lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_the_server_shows_the_experiment_on_loopback_and_ends_with_us(
    tmp_path: Path, stop: signal.Signals
) -> None:
    paths = RunPaths(tmp_path)
    experiment = connect(f"sqlite:///{paths.mlflow}").create_experiment("a sweep")
    command = [sys.executable, "-c", SERVE, str(tmp_path), json.dumps(RAW)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/#/experiments/(\d+)/", link)
        assert found, f"{link!r}; {(paths.logs / 'mlflow-server.log').read_text()}"
        port = int(found[1])
        assert found[2] == experiment
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in process.stdout.readline()
        query = f"ajax-api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        with urlopen(f"http://127.0.0.1:{port}/{query}", timeout=60) as answer:
            assert json.load(answer)["experiment"]["name"] == "a sweep"
        process.send_signal(stop)
        assert process.wait(timeout=60) == 0
    with socket.socket() as probe:
        assert probe.connect_ex((ui.HOST, port)) != 0, "the server outlives us"
