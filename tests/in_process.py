"""The `avflow` command in this process: no second import of the heavy libraries."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from avflow.orchestrator import cli


@dataclass(frozen=True)
class Done:
    """What the command left, as of a subprocess."""

    returncode: int
    stdout: str
    stderr: str


def avflow(*words: str) -> Done:
    """Run it; pages are 160 columns wide."""
    out, err = io.StringIO(), io.StringIO()
    argv = patch("sys.argv", ["avflow", *words])
    with (
        argv,
        patch.dict("os.environ", {"COLUMNS": "160"}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
