"""Nothing imports upward, and below the orchestrator the heavy libraries stay out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "pathways": {"pathways"},
    "datasets": {"datasets"},
    "workers": {"workers", "datasets", "pathways"},
    "orchestrator": {"orchestrator", "workers", "datasets", "pathways"},
}
FORBIDDEN = {
    "pathways": {"torch", "transformers", "ray", "mlflow", "polars", "pydantic"},
    # Pydantic checks one's own files; what workers import of datasets stays without it (below).
    "datasets": {"torch", "transformers", "ray", "mlflow", "polars"},
    "workers": {"mlflow", "polars", "pydantic", "typer"},
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "avflow":
                yield from ((f"avflow.{alias.name}", node.lineno) for alias in node.names)
            elif node.module:
                yield node.module, node.lineno


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_nothing_imports_upward(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.is_relative_to(ROOT / "orchestrator" / "public"):
            continue  # `import avflow` itself: a view of the orchestrator for notebooks
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] == "avflow":
                assert parts[1] in ALLOWED[package], f"{path}:{line} imports {name}"
            assert parts[0] not in FORBIDDEN.get(package, set()), f"{path}:{line} imports {name}"


def test_only_the_actor_file_of_the_workers_knows_ray() -> None:
    for path in sorted((ROOT / "workers").rglob("*.py")):
        if path.name != "actor.py":
            assert not [n for n, _ in imports(path) if n.split(".")[0] == "ray"], path


def test_workers_import_without_ray_mlflow_and_polars() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'polars', 'pydantic', 'typer'): sys.modules[name] = None\n"
        "import avflow.workers.run_unit, avflow.workers.models, avflow.workers.engine.reference\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def test_the_command_answers_without_loading_the_heavy_libraries() -> None:
    code = (
        "import sys, avflow.orchestrator.cli\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'matplotlib', 'polars'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
