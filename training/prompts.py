"""The shipped checkpoint and its prompts, by the product's own path."""

from pathlib import Path

import torch

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import Sample
from avflow.workers import models
from avflow.workers.models.base import LoadedModel, ModelSpec, Prepared

SPEC = ModelSpec(name="testbed", family="qwen2_5_omni", path="testbed", dtype="float32")


def load_checkpoint() -> LoadedModel:
    """The shipped checkpoint, as a sweep's worker loads it."""
    return models.load(SPEC, torch.device("cpu"))


def prepare(model: LoadedModel, root: Path, sample: Sample) -> Prepared:
    """Decode a sample's media and run the real processor on its prompt."""
    return model.prepare(sample, decode_sample(root, sample, model.media_spec))


def forward_inputs(prepared: Prepared) -> dict[str, object]:
    """What the official model's forward takes."""
    return {**prepared.tensors, "use_audio_in_video": prepared.sample.layout == "single_video"}
