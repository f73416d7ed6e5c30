"""A model over several devices: which part goes where, that the numbers stay, and too little room.

The two "devices" here are this machine's memory and its disk: accelerate's hooks, and a layer
whose weights are not where the prompt entered, are the same as with two GPUs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import salmonn
import torch
from accelerate import dispatch_model
from tiny_models import numbers, same_bits, spec_of
from torch import nn

from avflow.datasets.testbed.samples import load as load_samples
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.executors import Died, LocalExecutor, Ready
from avflow.orchestrator.policy import FailureKind
from avflow.pathways.layout import LayoutError
from avflow.workers.actor import ModelWorker
from avflow.workers.models import describe, frame_tokens_of, load, longest_prompt_of, video_salmonn2
from avflow.workers.models.base import (
    Features,
    ModelSpec,
    NotNowError,
    UnsupportedModelError,
    with_media,
)
from avflow.workers.models.placement import cuda_devices, device_map
from avflow.workers.models.room import needed_on_each, refuse_too_small
from avflow.workers.models.tiny import build_tiny_checkpoint


def parts(*sizes: int) -> list[tuple[str, nn.Module]]:
    return [(f"p{i}", nn.Linear(1, size, bias=False)) for i, size in enumerate(sizes)]


def test_each_device_gets_a_run_of_about_the_same_size() -> None:
    assert list(device_map(parts(4, 1, 1, 1, 1), ("a", "b")).values()) == ["a", *"bbbb"]
    assert list(device_map(parts(*[2] * 8), tuple("abcd")).values()) == list("aabbccdd")
    assert list(device_map(parts(1, 1), ("a",)).items()) == [("", "a")]
    found = list(device_map(parts(3, 1, 5, 2, 7, 1, 1), tuple("abc")).values())
    assert found == sorted(found), "runs, in the order of the forward"
    assert set(found) == {"a", "b", "c"}


def test_a_split_model_gives_the_same_numbers(tmp_path: Path) -> None:
    folder = build_tiny_checkpoint(tmp_path / "omni", n_layers=4)
    sight, match = load_samples(
        tmp_path, seed=0, samples_per_task=1, tasks=("sight", "match_image")
    )
    spec = spec_of(folder)
    whole, split = load(spec, "cpu"), load(spec, "cpu", "disk")
    placed = split.hf_model.hf_device_map
    assert set(placed.values()) == {"cpu", "disk"}
    on_disk = [any(p.is_meta for p in layer.parameters()) for layer in split.decoder.layers]
    assert any(on_disk), "some layers lie elsewhere than the prompt"
    assert split.device == torch.device("cpu")
    for sample in (sight, match):
        expected = numbers(whole, tmp_path, sample)
        assert same_bits(numbers(split, tmp_path, sample), expected)


@pytest.mark.parametrize("rule", ["generate", "train"])
def test_so_does_a_split_video_salmonn(tmp_path: Path, rule: str) -> None:
    """Its weights come from a dict, which transformers itself does not offload."""
    (sight,) = load_samples(tmp_path, seed=0, samples_per_task=1, tasks=("sight",))
    spec = salmonn.spec_of(salmonn.tiny_checkpoint(tmp_path / "salmonn"), positions=rule)
    whole, split = load(spec, "cpu"), load(spec, "cpu")
    placed = device_map(video_salmonn2.parts(split.hf_model), ("cpu", "disk"))
    placed["model.language_model.layers.0"] = "cpu"  # the sound's encoder is the larger half
    dispatch_model(split.hf_model, placed, offload_dir=tmp_path / "disk")
    on_disk = [any(p.is_meta for p in layer.parameters()) for layer in split.decoder.layers]
    assert any(on_disk), "some layers lie elsewhere than the prompt"
    assert not all(on_disk)
    assert same_bits(numbers(split, tmp_path, sight), numbers(whole, tmp_path, sight))


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2])
def test_on_gpus_the_numbers_are_those_of_the_cpu(tmp_path: Path, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA device(s)")
    spec = spec_of(build_tiny_checkpoint(tmp_path / "omni", n_layers=4))
    (sample,) = load_samples(tmp_path, seed=0, samples_per_task=1, tasks=("sight",))
    spread = load(spec, *cuda_devices(gpus))
    used = {parameter.device for parameter in spread.hf_model.parameters()}
    assert used == {torch.device(name) for name in cuda_devices(gpus)}
    expected = numbers(load(spec, "cpu"), tmp_path, sample)
    found = numbers(spread, tmp_path, sample)
    for curve, options in expected.items():
        np.testing.assert_allclose(found[curve], options, atol=1e-4)


@pytest.mark.parametrize(("gpus", "devices"), [(2, ("cuda:0", "cuda:1")), (1, ("cuda:0",))])
def test_a_worker_of_this_process_gets_all_of_its_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, devices: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given: list[tuple[str, ...]] = []

    class Noting(ModelWorker):
        def __init__(self, _name: str, _spec: object, devices: tuple[str, ...], _n: int) -> None:
            given.append(devices)

        def about(self) -> Any:
            return None, "here:1", ""

    executor = LocalExecutor(threads=1, worker_class=Noting)
    assert executor.has_room(gpus)
    executor.start_worker("w1", spec_of("testbed"), gpus)
    assert executor.poll(0) == [Ready(worker="w1", where="here:1")]
    assert given == [devices]
    with pytest.raises(ConfigError, match="gpus_per_model is 3, but this machine has 2 GPUs"):
        executor.has_room(3)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return spec_of(build_tiny_checkpoint(tmp_path / "omni", n_layers=2), dtype="bfloat16")


def test_a_card_must_hold_the_weights_and_a_samples_work(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = describe(spec)
    needed = needed_on_each(info, "bfloat16", longest_prompt_of(spec), spec.byte_budget)
    assert needed > info.weight_bytes("bfloat16") + spec.byte_budget
    memory = (needed - 1, needed - 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: memory)
    message = r"needs 2\.0 GiB on its GPU: .* the smallest has 2\.0 GiB; raise gpus_per_model"
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        load(spec, "cuda:0")
    assert not isinstance(refused.value, NotNowError), "another try would not help"
    memory = (needed - 1, needed)
    with pytest.raises(NotNowError, match=r"free is 2\.0 GiB of 2\.0 GiB: end what else runs"):
        load(spec, "cuda:0")


def test_gpus_that_are_not_there_are_told_from_gpus_that_are_too_small(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Ray was told of more GPUs than a machine has, or torch can't talk to its driver."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(NotNowError, match=r"of the 2 GPUs .* sees 1 \(CUDA_VISIBLE_DEVICES: 2,3\)"):
        load(spec, "cuda:0", "cuda:1")


def test_weights_are_shared_by_gpus_and_a_samples_work_is_not(spec: ModelSpec) -> None:
    info = replace(describe(spec), parameters=40 << 30)  # 80 GiB
    one, two, four = (
        needed_on_each(info, "bfloat16", 1000, spec.byte_budget, n) for n in (1, 2, 4)
    )
    assert one - two == pytest.approx(40 << 30, rel=1e-3)
    assert two - four == pytest.approx(20 << 30, rel=1e-3)
    assert four > (20 << 30) + spec.byte_budget
    refuse_too_small(spec, info, 1000, [(two, two)] * 2)
    with pytest.raises(UnsupportedModelError, match=r"on each of its 2 GPUs: .* 80\.0 GiB in all"):
        refuse_too_small(spec, info, 1000, [(2 * two, 2 * two), (two - 1, two - 1)])


@pytest.mark.parametrize(("family", "tokens"), [("qwen2_5_omni", 768), ("video_salmonn2", 79)])
def test_the_longest_prompt_follows_from_the_settings(family: str, tokens: int) -> None:
    spec = ModelSpec(name="m", family=family, path="p", max_frames=16)
    assert longest_prompt_of(spec) == 8 * 144 + 8 * 25 + 200
    assert longest_prompt_of(replace(spec, frame_tokens=None)) == 8 * tokens + 8 * 25 + 200


def test_a_frame_s_tokens_where_the_checkpoint_s_own_budget_decides() -> None:
    qwen = ModelSpec(name="m", family="qwen2_5_omni", path="p", frame_tokens=None)
    assert {frame_tokens_of(qwen, frames) for frames in (2, 40, 128)} == {768}
    salmonn = replace(qwen, family="video_salmonn2", max_frames=768)
    assert frame_tokens_of(salmonn, 768) == 79  # 61,250 pixels
    assert frame_tokens_of(salmonn, 40) == 1425  # 1,117,200: the few share those of the many
    assert frame_tokens_of(replace(salmonn, frame_tokens=9), 40) == 9


def test_a_worker_dies_for_good_of_a_card_that_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 30, 1 << 30))
    executor = LocalExecutor(threads=1)
    executor.start_worker("w1", spec_of("testbed"), 1)
    (died,) = executor.poll(0)
    assert isinstance(died, Died)
    assert died.kind is FailureKind.UNSUPPORTED
    assert "needs 2." in died.message
    assert "the smallest has 1.0 GiB" in died.message


def test_features_are_put_at_their_tokens_and_must_fit() -> None:
    table, ids = nn.Embedding(5, 2), torch.tensor([[1, 4, 4, 2]])
    features = Features(tensors={"video": torch.ones(2, 2)})
    hidden = with_media(table, ids, features, {"video": 4})
    assert torch.equal(hidden[0, 1:3], torch.ones(2, 2))
    assert torch.equal(hidden[0, [0, 3]], table(ids)[0, [0, 3]])
    with pytest.raises(LayoutError, match="has 1 places for 2 outputs of the video encoder"):
        with_media(table, ids, features, {"video": 1})
