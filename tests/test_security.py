"""What a stranger's file, model or network can't do. Each rule is read off the source, or tried."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from avflow.orchestrator import ui
from avflow.orchestrator.config import load_config
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.paths import RunPaths, slug
from avflow.workers.models.base import ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import weight_files

ROOT = Path(__file__).parents[1]
SHIPPED = ("orchestrator", "workers", "pathways", "datasets")
REST = ("training", "benchmarks")
SERIALISERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput"}
READS_PICKLES = {"torch.load", "numpy.load", "np.load", "torch.save", "pd.read_pickle"}
UNSAFE_YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}


def trees(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 5
    return ((path, ast.parse(path.read_text())) for path in files)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


def test_nothing_of_ours_reads_or_writes_pickles() -> None:
    for path, tree in trees(*SHIPPED, *REST):
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & SERIALISERS
            assert not found, f"{path}: imports {found}"
    for path, tree in trees(*SHIPPED):
        for name, call in calls(tree):
            assert name not in READS_PICKLES, f"{path}:{call.lineno}: {name}"
            assert keywords(call).get("allow_pickle", "False") == "False", path
    for path, tree in trees(*REST):  # training keeps its own drafts; torch then reads tensors alone
        for _, call in calls(tree):
            assert keywords(call).get("weights_only", "True") == "True", f"{path}:{call.lineno}"


def test_nothing_runs_text_that_came_from_elsewhere() -> None:
    for path, tree in trees(*SHIPPED, *REST):
        for name, call in calls(tree):
            assert name not in RUNS_TEXT, f"{path}:{call.lineno}: {name}"
            assert "shell" not in keywords(call), f"{path}:{call.lineno}: a shell"


def test_no_model_brings_its_own_code() -> None:
    for path, tree in trees(*SHIPPED, *REST):
        for name, call in calls(tree):
            given = keywords(call)
            assert given.get("trust_remote_code", "False") == "False", f"{path}:{call.lineno}"
            if ".Auto" in name and name.endswith(".from_pretrained"):
                # An Auto class may look for code in the checkpoint: it has to be told not to.
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}: {name}"


def test_yaml_is_read_safely(tmp_path: Path) -> None:
    for path, tree in trees(*SHIPPED, *REST):
        for name, call in calls(tree):
            assert name not in UNSAFE_YAML, f"{path}:{call.lineno}: {name}"
            if name in ("yaml.compose", "yaml.parse", "yaml.scan"):
                assert keywords(call).get("Loader") == "yaml.SafeLoader", f"{path}:{call.lineno}"
    sweep, mark = tmp_path / "sweep.yaml", tmp_path / "mark"
    sweep.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ConfigError):
        load_config(sweep)
    assert not mark.exists()


def test_weights_that_are_no_safetensors_are_not_read() -> None:
    for path, tree in trees("workers"):
        for name, call in calls(tree):
            loads = name.endswith(".from_pretrained") and "output_loading_info" in keywords(call)
            if loads and "state_dict" not in keywords(call):  # which come from `safe_open`
                assert keywords(call).get("use_safetensors") == "True", f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "..", ".", "a/../../b", "\0", "", "~"]
)
def test_names_in_a_sweep_file_stay_in_the_run_folder(tmp_path: Path, name: str) -> None:
    paths = RunPaths(tmp_path)
    folder = paths.partition("cells", name, name)
    assert folder.resolve().is_relative_to(paths.table("cells"))
    assert len(folder.relative_to(paths.table("cells")).parts) == 2
    assert slug(name) not in ("", ".", "..")


def test_the_file_of_a_data_set_stays_below_its_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}\n")
    sweep = {
        "name": "x",
        "models": [{"name": "m", "family": "qwen2_5_omni", "path": "testbed"}],
        "datasets": [
            {
                "name": "mine",
                "reader": "jsonl",
                "root": "data",
                "settings": {"file": "../secret.jsonl"},
            }
        ],
        "experiments": [{"name": "e"}],
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    from avflow.orchestrator.sweep import plan_sweep

    with pytest.raises(ConfigError, match="leaves the data set's root"):
        plan_sweep(load_config(file))


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/x.safetensors"])
def test_a_checkpoint_s_weights_lie_in_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    spec = ModelSpec(name="m", family="qwen2_5_omni", path=str(tmp_path), dtype="float32")
    with pytest.raises(UnsupportedModelError, match="outside of its folder"):
        weight_files(spec, tmp_path)


def test_nothing_is_served_to_other_machines() -> None:
    assert ui.HOST == "127.0.0.1"
    shipped = [ROOT / "cluster.yaml", *(ROOT / "slurm").glob("*")]
    for path in shipped:
        text = path.read_text()
        assert "0.0.0.0" not in text, path
        for line in text.splitlines():
            if "ray start --head" in line:
                assert "--dashboard-host=127.0.0.1" in line, path
                assert "RAY_AUTH_MODE=token" in line, path


@pytest.mark.ray
def test_what_ray_starts_here_listens_on_this_machine_alone() -> None:
    import psutil

    from avflow.orchestrator.cluster import start_ray

    start_ray(None)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 64
    listening = {
        (process.name(), connection.laddr.ip)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) >= 2, "the raylet and the GCS at least"
    assert all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for _, ip in listening), listening
