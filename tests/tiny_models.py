"""Tiny checkpoints on disk, real samples for them, and what comes out of a unit."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import Sample
from avflow.pathways.catalogue import ALL
from avflow.workers.models.base import LoadedModel, ModelSpec
from avflow.workers.protocol import CurveDone, CurveSpec, UnitFailure, UnitSpec
from avflow.workers.run_unit import run_unit

SPEECH = {
    "talker.model.norm.weight": "model-00003-of-00003.safetensors",
    "token2wav.weight": "model-00003-of-00003.safetensors",
}
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def spec_of(path: Path | str, **changes: Any) -> ModelSpec:
    fields = {"name": "tiny", "family": "qwen2_5_omni", "path": str(path), "dtype": "float32"}
    return ModelSpec(**(fields | changes))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def as_published(folder: Path) -> None:
    """Turn a thinker's checkpoint into the layout of the hub: a full model in three shards.

    Shard 1 holds half of the thinker, 2 the rest and a tensor of the talker, 3 speech alone.
    """
    single = folder / "model.safetensors"
    weights = {f"thinker.{key}": tensor for key, tensor in load_file(single).items()}
    keys = sorted(weights)
    halves = [set(keys[: len(keys) // 2]), set(keys[len(keys) // 2 :])]
    weight_map = {key: SHARDS[0] if key in halves[0] else SHARDS[1] for key in keys}
    weight_map |= {"talker.thinker_to_talker_proj.weight": SHARDS[1], **SPEECH}
    for shard in SHARDS:
        held = {
            key: weights.get(key, torch.zeros(2, 2))
            for key, file in weight_map.items()
            if file == shard
        }
        save_file(held, folder / shard, metadata={"format": "pt"})
    single.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    thinker = json.loads((folder / "config.json").read_text())
    full = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": True}
    (folder / "config.json").write_text(json.dumps(full))
    (folder / "spk_dict.pt").write_bytes(b"voices")


def unit_of(n_layers: int, root: Path, sample: Sample, window: int = 3) -> UnitSpec:
    """Every pathway of the sample, at all centre layers."""
    curves = tuple(
        CurveSpec(
            pathway=pathway,
            window=window,
            center_layers=tuple(range(n_layers)),
            correct_only=False,
        )
        for pathway in ALL
        if pathway.layout == sample.layout
    )
    return UnitSpec(
        unit_id=f"u-{sample.sample_id}",
        model="tiny",
        data_root=str(root),
        sample=sample,
        curves=curves,
        wanted=frozenset(curve.key for curve in curves),
        byte_budget=2**26,
        cost=1,
    )


def numbers(model: LoadedModel, root: Path, sample: Sample, window: int = 3) -> dict[str, Any]:
    """The sample's `unit_of` through `run_unit`: p_options by curve."""
    unit = unit_of(model.info.n_layers, root, sample, window)
    media = decode_sample(root, sample, model.media_spec)
    events = list(run_unit(model, unit, media, 0.0))
    done = {event.curve: event.p_options for event in events if isinstance(event, CurveDone)}
    failed = [event for event in events if isinstance(event, UnitFailure)]
    assert set(done) == unit.wanted, failed
    return done


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@contextmanager
def hub_cache(monkeypatch: Any, cache: Path, hub_id: str, folder: Path) -> Iterator[str]:
    """Within, the local cache holds `folder` as the hub's `main`, and the network is forbidden.
    Yields the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / commit)
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield commit
