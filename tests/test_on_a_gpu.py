"""A unit's whole work with every weight on a GPU that is not there: what is left on the wrong
device is an error there, as it is on a real one. The numbers are the CPU's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import salmonn
import torch
from pretend_gpu import GPU, OnGpu, moved, pretending
from unit_runs import unit

from avflow.datasets.media import decode_sample
from avflow.datasets.testbed.samples import load as load_samples
from avflow.pathways import catalogue
from avflow.pathways.layout import LayoutKind
from avflow.workers import models
from avflow.workers.encoders import EncoderCache
from avflow.workers.engine import flex_kernel, kernel_check
from avflow.workers.models.base import LoadedModel, ModelSpec
from avflow.workers.models.tiny import build_tiny_checkpoint
from avflow.workers.protocol import (
    CurveDone,
    CurveSpec,
    DiscardSpec,
    DiscardStep,
    Event,
    ExtraSpec,
    InterventionDone,
    MaskSpec,
    ProbeDone,
    ProbeSpec,
    SampleDone,
    UnitSpec,
)
from avflow.workers.run_unit import run_unit

NEARLY = {"float32": 1e-6, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen2_5_omni": str(build_tiny_checkpoint(folder / "omni", seed=1)),
        "video_salmonn2": str(salmonn.tiny_checkpoint(folder / "salmonn")),
    }


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels are tried on this device as on any; the compiled one has no stand-in."""
    monkeypatch.setattr(flex_kernel, "kernel_for", lambda device, heads: None)
    kernel_check.fits.cache_clear()
    yield
    kernel_check.fits.cache_clear()


def load(checkpoints: dict[str, str], family: str, dtype: str) -> LoadedModel:
    spec = ModelSpec(name="m", family=family, path=checkpoints[family], dtype=dtype)
    return models.load(spec, "cpu")


def put_on_gpu(model: Any) -> LoadedModel:
    """The same model; it can't be used on the CPU any more."""
    moved(model.hf_model)
    there: LoadedModel = replace(model, device=GPU)
    return there


def everything(n_layers: int, layout: LayoutKind) -> tuple[tuple[CurveSpec, ...], tuple[Any, ...]]:
    """Every pathway at every centre, a mask, discards, all probes."""
    pathways = tuple(p for p in catalogue.ALL if p.layout == layout)
    curves = tuple(
        CurveSpec(pathway=p, window=3, center_layers=tuple(range(n_layers)), correct_only=False)
        for p in pathways
    )
    layers, middle = tuple(range(n_layers)), n_layers // 2
    extras: tuple[ExtraSpec, ...] = (
        MaskSpec(name="some", pathways=pathways[:2], layers=layers[1:]),
        DiscardSpec(name="full", steps=()),
        DiscardSpec(name="gone", steps=(DiscardStep(after_layer=0, groups=("question",)),)),
        ProbeSpec(name="last_attention", layers=layers),
        ProbeSpec(name="attention_map", layers=(0, middle)),
        ProbeSpec(name="norms", layers=layers),
        ProbeSpec(name="sinks", layers=layers),
    )
    return curves, extras


def numbers(event: Event) -> Sequence[Any]:
    match event:
        case CurveDone():
            return event.p_knockout, event.p_options, event.n_blocked_edges, event.p_base
        case InterventionDone():
            return event.p, event.p_options, event.p_base
        case ProbeDone():
            return event.layer, event.position, event.value
        case SampleDone():
            return event.p_base, event.p_options, event.token_layers, event.flops
    raise AssertionError(event)  # a failure says what went wrong


@pytest.mark.parametrize(
    ("family", "task", "dtype"),
    [
        ("qwen2_5_omni", "sight", "bfloat16"),
        ("qwen2_5_omni", "match_image", "float32"),
        ("video_salmonn2", "sight", "float32"),
    ],
)
def test_a_whole_unit_gives_the_numbers_of_a_cpu(
    checkpoints: dict[str, str], family: str, task: str, dtype: str, tmp_path: Path
) -> None:
    (sample,) = load_samples(tmp_path, seed=3, samples_per_task=1, tasks=(task,))
    model = load(checkpoints, family, dtype)
    curves, extras = everything(model.info.n_layers, sample.layout)
    asked: UnitSpec = replace(
        unit(curves, {spec.key for spec in (*curves, *extras)}),
        sample=sample,
        data_root=str(tmp_path),
        extras=extras,
    )
    media = decode_sample(tmp_path, sample, model.media_spec)
    expected = list(run_unit(model, asked, media, 0, EncoderCache()))
    there = put_on_gpu(model)
    with pretending():
        found = list(run_unit(there, asked, media, 0, EncoderCache()))
    assert len(expected) == len(curves) + len(extras) + 1
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is type(theirs), mine
        for a, b in zip(numbers(mine), numbers(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=NEARLY[dtype])


def test_a_card_with_little_room_is_given_smaller_batches(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    (sample,) = load_samples(tmp_path, seed=3, samples_per_task=1, tasks=("sight",))
    model = load(checkpoints, "video_salmonn2", "float32")
    curves, _ = everything(model.info.n_layers, sample.layout)
    asked = replace(unit(curves[:3]), sample=sample, data_root=str(tmp_path))
    media = decode_sample(tmp_path, sample, model.media_spec)
    on_gpu = put_on_gpu(model)
    with pretending():
        roomy = list(run_unit(on_gpu, asked, media, 0))
    with pretending(free_bytes=2 * 10**5):
        cramped = list(run_unit(on_gpu, asked, media, 0))
    assert isinstance(roomy[-1], SampleDone)
    assert isinstance(cramped[-1], SampleDone)
    assert roomy[-1].split_batches == 0
    assert cramped[-1].split_batches > 0
    for a, b in zip(cramped[:-1], roomy[:-1], strict=True):
        np.testing.assert_allclose(numbers(a)[0], numbers(b)[0], atol=1e-6)


def test_mixed_devices_are_refused() -> None:
    with pretending():
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert isinstance(there, OnGpu)
        assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
        assert there[torch.tensor([0, 1])].device == GPU
        assert here.to("cuda").device == GPU
        there.copy_(torch.zeros(3))
        assert there.cpu().numpy().tolist() == [0, 0, 0]
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[torch.zeros(1, dtype=torch.int64, device=GPU)],
            lambda: there.index_select(0, torch.zeros(1, dtype=torch.int64)),
            lambda: here.add_(there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
