"""The decoding benchmark runs, and the two ways that it times give the same pictures and sound."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from avflow.datasets.media import decode_media

PATH = Path(__file__).parents[1] / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decode_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_sees_and_hears_what_we_do(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_clip(tmp_path / "clip.mp4", 2)
    frames, wave = benchmark.reference(tmp_path / "clip.mp4", benchmark.SPEC)
    ours = decode_media(tmp_path, benchmark.CLIP, benchmark.SPEC)
    assert ours.frames is not None
    assert ours.waveform is not None
    assert ours.frames.shape == tuple(frames.shape) == (4, 3, 252, 448)
    # The first frame is the same; the reference spreads the others to the very last.
    assert np.abs(ours.frames[0] - frames[0].numpy()).mean() < 4
    n = len(ours.waveform)
    assert len(wave) == pytest.approx(n, abs=1100)  # an encoder's padding is left in there
    assert np.corrcoef(ours.waveform, wave[:n])[0, 1] > 0.99


def test_a_gpu_s_time_is_the_plan_s(benchmark: ModuleType) -> None:
    both = [benchmark.nominal_gpu_seconds(30, of) for of in benchmark.SWEEPS.values()]
    assert 1 < both[0] < 60
    assert both[1] < both[0] / 20
