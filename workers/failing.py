"""Exceptions as data: what a failure record holds, and which errors ruin the worker instead."""

import traceback

import torch

from avflow.workers.protocol import Stage, UnitFailure


def failure(unit_id: str, curve: str | None, stage: Stage, error: Exception) -> UnitFailure:
    """The record of an exception, its chain of causes in the traceback."""
    return UnitFailure(
        unit_id=unit_id,
        curve=curve,
        stage=stage,
        error=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        retryable=is_out_of_memory(error) or isinstance(error, OSError),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """A device, or torch's CPU allocator, could not give what was asked; smaller pieces may go."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def ruins_worker(error: BaseException) -> bool:
    """Nothing that follows on this worker can be trusted: raise it, don't record it."""
    return isinstance(error, MemoryError | torch.AcceleratorError)
