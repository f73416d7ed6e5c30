"""A model over several devices: which part goes where, that the numbers stay, and too little room.

The two "devices" here are this machine's memory and its disk: accelerate's hooks, and a layer
whose weights are not where the prompt entered, are the same as with two GPUs.
"""

from pathlib import Path

import pytest
import torch
from tiny_models import numbers, same_bits, spec_of
from torch import nn

from avflow.datasets.testbed.samples import load as load_samples
from avflow.workers.models import describe, load
from avflow.workers.models.base import UnsupportedModelError
from avflow.workers.models.placement import device_map, refuse_too_large
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


def test_gpus_that_are_too_small_are_told_with_both_numbers(tmp_path: Path) -> None:
    spec = spec_of(build_tiny_checkpoint(tmp_path / "omni", n_layers=2), dtype="bfloat16")
    info = describe(spec)
    refuse_too_large(spec, info, [info.weight_bytes("bfloat16")])
    refuse_too_large(spec, info, [info.parameters, info.parameters])
    with pytest.raises(UnsupportedModelError, match=r"take 0\.0 GiB, free on 2 GPU"):
        refuse_too_large(spec, info, [info.parameters, info.parameters - 1])
