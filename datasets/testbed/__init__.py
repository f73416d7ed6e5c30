"""The testbed: a synthetic audio-visual world with questions whose needed senses are known."""

from avflow.datasets.testbed.questions import TASKS, TaskInfo
from avflow.datasets.testbed.samples import load

__all__ = ["TASKS", "TaskInfo", "load"]
