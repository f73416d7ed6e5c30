"""The disk fills, the GPU's memory runs out: whole sweeps in process, against an undisturbed."""

import errno
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from tiny_sweep import write_sweep

from avflow.orchestrator import parts, store
from avflow.orchestrator.config import load_config
from avflow.orchestrator.errors import ExitStatus, StoreError
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import read, standing_failures
from avflow.orchestrator.sweep import SweepOutcome, run_sweep
from avflow.workers import batches


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit a commit of its own; publishing has tests of its own."""
    monkeypatch.setattr(store, "COMMIT_UNITS", 1)
    monkeypatch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_sweep(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
        assert run(folder, "undisturbed").exit_status == ExitStatus.DONE
    return folder


def run(place: Path, name: str) -> SweepOutcome:
    return run_sweep(load_config(place / "sweep.yaml"), place / name, progress=Silent())


def cells(folder: Path) -> pl.DataFrame:
    return read(folder).sort("job_id", "sample_id")


def rows_on_disk(folder: Path, table: Any = "cells") -> int:
    """With doubles, if there are any: no reader in between."""
    found = parts.find_parts(RunPaths(folder).table(table))
    return sum(pl.read_parquet(part, hive_partitioning=False).height for part in found)


class HalfWritten:
    """A file that takes half of what it is given, and then no more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._file.write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, at: str, after: int) -> list[None]:
    """ENOSPC at each step of this kind, once so many parts of results have been written."""
    refused: list[None] = []
    real_write, real_open = store.write_atomically, Path.open
    written = 0

    def write(*args: Any) -> None:
        nonlocal written
        written += 1
        if written > after:
            refused.append(None)
            with pytest.MonkeyPatch.context() as full:
                match at:
                    case "write":
                        full.setattr(Path, "open", half)
                    case "fsync":
                        full.setattr(os, "fsync", no_room)
                    case "replace":
                        full.setattr(Path, "replace", no_room)
                real_write(*args)
        else:
            real_write(*args)

    def half(path: Path, *mode: Any) -> Any:
        return HalfWritten(real_open(path, *mode))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_atomically", write)
    return refused


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
@pytest.mark.parametrize("after", [1, 2])
def test_a_full_disk_ends_the_sweep_and_the_next_run_does_the_rest(
    place: Path, monkeypatch: pytest.MonkeyPatch, at: str, after: int
) -> None:
    folder = place / f"full-{at}-{after}"
    with pytest.MonkeyPatch.context() as patch:
        refused = fill_the_disk(patch, at, after)
        with pytest.raises(StoreError, match="results can't be written"):
            run(place, folder.name)
    assert refused
    kept = rows_on_disk(folder)
    assert 0 < kept < rows_on_disk(place / "undisturbed")
    assert not list(RunPaths(folder).temporary.glob("*")), "no draft takes room"

    assert run(place, folder.name).exit_status == ExitStatus.DONE
    assert_frame_equal(cells(folder), cells(place / "undisturbed"), check_exact=True)
    assert rows_on_disk(folder) == rows_on_disk(place / "undisturbed"), "nothing twice"
    assert rows_on_disk(folder, "samples") == 4


def assert_close(ours: pl.DataFrame, theirs: pl.DataFrame) -> None:
    """Probabilities to 1e-6; what is derived from them follows."""
    derived = ["delta", "p_options"]
    assert_frame_equal(ours.drop(derived), theirs.drop(derived), abs_tol=1e-6, rel_tol=0)
    options = ours["p_options"].explode() - theirs["p_options"].explode()
    worst: Any = options.abs().max()
    assert worst < 1e-6


def test_where_gpu_memory_runs_out_batches_are_cut_and_the_cells_are_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = batches.replay, []

    def replay(decoder: Any, baseline: Any, trunk: Any, batch: Any, *rest: Any) -> Any:
        if len(batch.rows) > 3:
            refused.append(len(batch.rows))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return real(decoder, baseline, trunk, batch, *rest)

    monkeypatch.setattr(batches, "replay", replay)
    assert run(place, "memory").exit_status == ExitStatus.DONE
    assert refused
    samples = read(place / "memory", "samples")
    assert samples["split_batches"].sum() == len(refused)
    assert read(place / "undisturbed", "samples")["split_batches"].sum() == 0
    ours, theirs = cells(place / "memory"), cells(place / "undisturbed")
    assert_close(ours, theirs)
    split = samples.filter(pl.col("split_batches") > 0)["sample_id"].to_list()
    whole = ~pl.col("sample_id").is_in(split)
    assert_frame_equal(ours.filter(whole), theirs.filter(whole), check_exact=True)
    assert samples.height == rows_on_disk(place / "memory", "samples") == 4


def test_a_row_that_never_fits_fails_its_curves_and_no_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches.replay

    def replay(decoder: Any, baseline: Any, trunk: Any, batch: Any, *rest: Any) -> Any:
        if batch.group == 0:  # its rows, however few at a time
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(decoder, baseline, trunk, batch, *rest)

    monkeypatch.setattr(batches, "replay", replay)
    outcome = run(place, "never")
    assert outcome.exit_status == ExitStatus.WITH_FAILURES
    lost = standing_failures(place / "never")
    assert set(lost["kind"]) == {"gpu_memory"}
    assert lost["curve"].null_count() == 0
    ours, theirs = cells(place / "never"), cells(place / "undisturbed")
    both = ours.join(theirs, on=["job_id", "sample_id"], suffix="_theirs")
    assert 0 < both.height == ours.height < theirs.height
    worst: Any = (both["p_knockout"] - both["p_knockout_theirs"]).abs().max()
    assert worst < 1e-6
    monkeypatch.undo()
    monkeypatch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
    mended = run_sweep(
        load_config(place / "sweep.yaml"), place / "never", only_failed=True, progress=Silent()
    )
    assert mended.exit_status == ExitStatus.DONE
    assert_close(cells(place / "never"), theirs)
