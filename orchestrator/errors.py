"""Errors that a person can act on. Each message says what, where, and what would work.

All pass through pickle whole (they may cross a process): no class here has its own `__init__`
without the `__reduce__` that gives it back.
"""

from enum import IntEnum


class ExitStatus(IntEnum):
    """What the command says to the shell."""

    DONE = 0
    UNEXPECTED = 1
    CONFIGURATION = 2  # usage or configuration: nothing was started
    WITH_FAILURES = 3  # finished, but something failed for good
    HUNG_UP = 129  # the terminal went away
    INTERRUPTED = 130
    TERMINATED = 143


class AvflowError(Exception):
    """Base of all. Printed without a traceback."""

    exit_status = ExitStatus.UNEXPECTED


class ConfigError(AvflowError):
    """The sweep file, or what it points to, can't be used. Nothing has been started."""

    exit_status = ExitStatus.CONFIGURATION


class StoreError(AvflowError):
    """A run folder can't be used: unreadable, unwritable, or not a run folder at all."""

    exit_status = ExitStatus.CONFIGURATION


class IdentityMismatch(StoreError):
    """The run folder holds the results of another sweep. Names the fields that differ."""


class RunLocked(StoreError):
    """Another driver writes to this run folder. Names its host and process."""


class SweepAborted(AvflowError):
    """The sweep can't go on: every model was given up, or results can't be written."""
