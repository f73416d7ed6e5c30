"""Steps of `kill_harness.py`, one after the other, in one process of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HARNESS = Path(__file__).with_name("kill_harness.py")


@contextmanager
def harness(config: Path) -> Iterator[Callable[[Mapping[str, str]], dict[str, Any]]]:
    """What runs a step of this sweep and gives its answer; see there."""
    with subprocess.Popen(
        [sys.executable, str(HARNESS), str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(step: Mapping[str, str]) -> dict[str, Any]:
            print(json.dumps(step), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield run
        process.stdin.close()
