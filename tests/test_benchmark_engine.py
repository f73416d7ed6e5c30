"""The engine's benchmarks run, on a small model, and what they time is right."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def scripts(benchmark_scripts: dict[str, ModuleType]) -> Iterator[dict[str, ModuleType]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are too small to share
    yield benchmark_scripts
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(scripts: dict[str, ModuleType]) -> Any:
    size = replace(scripts["engine"].QUICK, layers=9, chunks=2, vocabulary=100, window=3)
    return scripts["cases"].build(size, torch.float32, torch.device("cpu"))


def test_engine_and_plain_way_agree_and_no_count_beats_its_bound(scripts: Any, case: Any) -> None:
    report = scripts["engine"].compare(case, repeats=1)
    assert report["agreement"] < 1e-6
    rows = {**report["pathways"], "panel": report["panel"]}
    assert set(rows) == {*scripts["engine"].ALONE, "panel"}
    for name, row in rows.items():
        assert row["speedup"] > 0, name
        assert row["bound"] > 1, name
        assert row["flops_over_bound"] >= 1, name
    scripts["engine"].show({**report, "tokens": 1, "layers": 9, "machine": "here"})


def test_discarding_is_timed_beside_what_it_saves(scripts: Any, case: Any) -> None:
    rows = scripts["discard"].latency(case, repeats=1)
    assert [row["way"] for row in rows] == list(scripts["discard"].ways(case))
    assert all(row["bound"] > 1 and row["speedup"] > 0 for row in rows)
    scripts["discard"].show(case, rows)


def test_the_gpu_scripts_precision_is_right_where_there_is_no_gpu(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(scripts["gpu"].SMALL, layers=7, hidden=256, intermediate=512, heads=2,
                    kv_heads=1, chunks=1, pair_patches=(4, 4), question=48)  # fmt: skip
    monkeypatch.setattr(scripts["gpu"], "SMALL", small)
    found = scripts["gpu"].precision(torch.device("cpu"), prompts=2)
    assert found["float32_agreement"] < 1e-6
    assert 0 < found["engine"] < 0.1
    assert 0 < found["plain"] < 0.1
