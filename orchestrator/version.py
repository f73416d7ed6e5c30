"""Which code this is: its version, and the commit that it was taken from.

A wheel and a source archive carry the commit in a file that `setup.py` writes; a checkout asks git.
This module imports nothing of avflow: `setup.py` runs it by its path.
"""

import subprocess
from importlib import metadata
from pathlib import Path

BAKED = "commit.txt"  # beside this file


def version() -> str:
    """Of the installed package, as `0.1.0`."""
    return metadata.version("avflow")


def commit() -> str | None:
    """The commit's id, with `+` if tracked files were changed since; None where nobody knows."""
    baked = Path(__file__).with_name(BAKED)
    if baked.is_file():
        return baked.read_text(encoding="ascii").strip() or None
    # An installed package may lie in somebody else's repository, whose commit says nothing.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    found = _git("rev-parse", "HEAD")
    return found and found + ("+" if _git("status", "--porcelain", "-uno") else "")


def described() -> str:
    """`0.1.0 (commit 1a2b3c…)`."""
    return f"{version()} (commit {commit() or 'unknown'})"


def _git(*words: str) -> str | None:
    """What git prints, run beside this file; None when it fails or is not there."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
