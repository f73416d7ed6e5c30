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

    @property
    def said(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr


def avflow(*words: object, columns: int = 160) -> Done:
    """Run it; pages are `columns` wide."""
    out, err = io.StringIO(), io.StringIO()
    argv = patch("sys.argv", ["avflow", *map(str, words)])
    with (
        argv,
        patch.dict("os.environ", {"COLUMNS": str(columns)}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
