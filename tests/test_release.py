"""The wheel holds what a sweep needs, knows its commit, and runs where nothing else of us is."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from avflow.orchestrator.version import commit, described

ROOT = Path(__file__).parents[1]


def git(*words: str, cwd: Path = ROOT) -> str:
    return subprocess.run(
        ["git", *words], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="an unpacked archive has no commit to compare with"
)


@needs_git
def test_a_checkout_says_its_commit() -> None:
    found = commit()
    assert found is not None
    assert found.removesuffix("+") == git("rev-parse", "HEAD")
    assert found in described()


@needs_git
def test_a_package_inside_somebody_elses_repository_does_not_say_its_commit(
    tmp_path: Path,
) -> None:
    git("init", "-q", cwd=tmp_path)
    names = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    git(*names, "commit", "-q", "--allow-empty", "-m", "x", cwd=tmp_path)
    shutil.copy(ROOT / "orchestrator" / "version.py", tmp_path)
    code = f"import runpy; print(runpy.run_path({str(tmp_path / 'version.py')!r})['commit']())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "None"


def test_the_citation_and_the_licence_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert {"title", "authors", "message", "cff-version"} <= citation.keys()


def source_tree(folder: Path) -> Path:
    """A clone with this checkout's changes, so that building leaves nothing behind here."""
    git("clone", "-q", str(ROOT), str(folder))
    for name in git("ls-files").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, what: str, into: Path) -> Path:
    code = f"from setuptools import build_meta as b; print(b.build_{what}({str(into)!r}))"
    into.mkdir(exist_ok=True)
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    return into / said.stdout.split()[-1]


@needs_git
@pytest.mark.slow
def test_the_wheel_of_the_archive_runs_the_demo_where_nothing_else_of_us_is(
    tmp_path: Path,
) -> None:
    source = source_tree(tmp_path / "source")
    head = git("rev-parse", "HEAD", cwd=source)
    archive = build(source, "sdist", tmp_path / "dist")
    shutil.unpack_archive(archive, tmp_path / "unpacked")  # no git in there
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build(unpacked, "wheel", tmp_path / "dist")

    home = tmp_path / "elsewhere"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    # The libraries of this environment, but not its editable avflow: .pth files are not followed.
    (packages / "libraries.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, cwd=home)

    avflow = home / "bin" / "avflow"
    said = subprocess.run([avflow, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"avflow [\d.]+ \(commit {head}\+?\)\n", said.stdout)
    words = ["demo", "--limit", "1", "--workers", "1"]
    done = subprocess.run(
        [avflow, *words], cwd=home, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "9 of 9 samples have ended" in done.stdout
    session = json.loads((home / "runs/demo/provenance.jsonl").read_text().splitlines()[0])
    assert session["commit"].removesuffix("+") == head
    where = subprocess.run(
        [python, "-c", "import avflow; print(avflow.__file__)"],
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(home)
