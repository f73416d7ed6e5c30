"""Samples that share a video share its encoding, and nothing about their numbers changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import spec_of

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import Sample
from avflow.datasets.testbed.samples import load as load_samples
from avflow.workers.encoders import EncoderCache, media_digest
from avflow.workers.models import load
from avflow.workers.models.base import Features, Prepared
from avflow.workers.models.tiny import build_tiny_checkpoint


class Counting:
    """A loaded model that counts how often its encoders run."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.runs = model, model.device, 0

    def encode(self, prepared: Prepared) -> Features:
        self.runs += 1
        return self.model.encode(prepared)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=2)
    return load(spec_of(folder), "cpu")


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    """Two questions about each of two videos."""
    return load_samples(root, seed=0, samples_per_task=2, tasks=("sight", "sound"))


@pytest.fixture(scope="module")
def prompts(model: Any, root: Path, samples: list[Sample]) -> list[Prepared]:
    return [model.prepare(s, decode_sample(root, s, model.media_spec)) for s in samples]


def equal(one: Features, other: Features) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


def test_a_shared_video_is_encoded_once_with_the_same_bits(
    model: Any, prompts: list[Prepared]
) -> None:
    cache, counting = EncoderCache(), Counting(model)
    assert prompts[0].tensors["input_ids"].shape != prompts[2].tensors["input_ids"].shape
    for prepared in prompts:
        features = cache.encode(counting, prepared)
        alone = model.encode(prepared)
        assert equal(features, alone)
        shared, own = model.embed(prepared, features), model.embed(prepared, alone)
        assert torch.equal(shared.inputs_embeds, own.inputs_embeds)
        assert torch.equal(shared.position_ids, own.position_ids)
    assert (counting.runs, cache.hits, cache.misses) == (2, 2, 2)


def test_the_digest_is_of_what_the_encoders_are_given(prompts: list[Prepared]) -> None:
    first, other_video, same_video = prompts[0], prompts[1], prompts[2]
    assert media_digest(first) == media_digest(same_video)
    assert media_digest(first) != media_digest(other_video)
    for name, tensor in first.tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        touched = replace(first, tensors={**first.tensors, name: changed})
        is_text = name in ("input_ids", "attention_mask")
        assert (media_digest(touched) == media_digest(first)) is is_text, name


def test_what_was_used_last_is_kept_within_the_limit(model: Any, prompts: list[Prepared]) -> None:
    size = sum(t.nbytes for t in model.encode(prompts[0]).tensors.values())
    cache, counting = EncoderCache(byte_limit=size), Counting(model)
    for prepared in (prompts[0], prompts[2], prompts[1], prompts[0]):
        cache.encode(counting, prepared)
        assert cache.held_bytes <= size
    assert counting.runs == 3
    tight = EncoderCache(byte_limit=size - 1)
    assert equal(tight.encode(counting, prompts[0]), model.encode(prompts[0]))
    assert tight.held_bytes == 0
