"""`avflow ui RUN`: MLflow's own server on this machine alone, opened where the curves are."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.errors import AvflowError
from avflow.orchestrator.paths import RunPaths, quoted
from avflow.orchestrator.tracking import connect, tracking_uri

HOST = "127.0.0.1"
DEFAULT_PORT = 5000
_START_S = 300.0
_STOP_S = 10.0


class ServerError(AvflowError):
    """MLflow's server can't be started, or there is nothing to show."""


def chart_link(base: str, experiment_id: str) -> str:
    """The page that draws the curves of tasks. MLflow 3 opens in another mode unless the link says
    so. Runs of categories are there too, behind the search box."""
    tasks = quote("tags.kind = 'cell'")
    query = f"workflowType=machine_learning&compareRunsMode=CHART&searchFilter={tasks}"
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{query}"


def serve(
    paths: RunPaths,
    config: SweepConfig,
    *,
    port: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the sweep's MLflow store until interrupted (Ctrl-C or SIGTERM), and say its links.

    `port` None: MLflow's usual one, or any free one if that is taken. Raises ServerError if nothing
    has been published, the port is taken, or the server does not come up. Of a sweep that is
    published to a server elsewhere only the link is said.
    """
    uri = tracking_uri(paths, config)
    if config.mlflow.tracking_uri is None and not paths.mlflow.is_file():
        raise ServerError(
            f"{paths.root} has no MLflow store yet; make it with: avflow track {quoted(paths.root)}"
        )
    experiment = connect(uri).get_experiment_by_name(config.name)
    if experiment is None:
        raise ServerError(
            f"MLflow at {uri} has no experiment {config.name!r}; publish it with: "
            f"avflow track {quoted(paths.root)}"
        )
    if uri.startswith(("http://", "https://")):
        say(chart_link(uri, experiment.experiment_id))
        return
    port = _free_port(port)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    server = _start(uri, paths, port)
    try:
        base = f"http://{HOST}:{port}"
        _wait_until_up(server, base, _log(paths))
        say(f"Curves:  {chart_link(base, experiment.experiment_id)}")
        say(f"From another machine:  ssh -N -L {port}:{HOST}:{port} {socket.gethostname()}")
        say("Ctrl-C stops the server.")
        server.wait()
        raise ServerError(
            f"MLflow's server ended by itself, with status {server.returncode}; see {_log(paths)}"
        )
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        _stop(server)
        signal.signal(signal.SIGTERM, before)


def _free_port(wanted: int | None) -> int:
    """A free port on the loopback. Raises ServerError if the wanted one is taken."""
    for port in (DEFAULT_PORT, 0) if wanted is None else (wanted,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError(f"port {wanted} on {HOST} is taken; give another one, or none to pick one")


def _start(uri: str, paths: RunPaths, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", str(paths.mlflow_artifacts.resolve())]
    paths.logs.mkdir(exist_ok=True)
    # A group of its own: Ctrl-C reaches us alone, and we end the server with its workers. Jobs are
    # for MLflow's other uses; without them seven processes fewer are started.
    with _log(paths).open("wb") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _log(paths: RunPaths) -> Path:
    return paths.logs / "mlflow-server.log"


def _wait_until_up(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerError(
                f"MLflow's server ended with status {server.returncode} before it was up; see {log}"
            )
        try:
            with urlopen(f"{base}/health", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ServerError(
        f"MLflow's server at {base} did not answer within {_START_S:.0f} s; see {log}"
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, gently first, then whatever is left of its group."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=_STOP_S)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
