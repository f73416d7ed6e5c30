"""Qwen2.5-Omni's files: what config.json, weights and processor may say, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, spec_of

from avflow.workers.models import describe, load, resolve_path
from avflow.workers.models.base import UnsupportedModelError
from avflow.workers.models.tiny import build_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=4)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_describe_reads_sizes_and_tells_checkpoints_apart(checkpoint: Path, copy: Path) -> None:
    info = describe(spec_of(checkpoint))
    assert (info.n_layers, info.hidden_size, info.n_heads, info.n_kv_heads) == (4, 64, 4, 2)
    assert info == describe(spec_of(copy))
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert describe(spec_of(copy)).digest != info.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window=True"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda c: c.update(quantization_config={}), "quantization_config"),
        (lambda c: c.pop("vision_start_token_id"), "vision_start_token_id is missing"),
        (lambda c: c["text_config"].pop("hidden_size"), "hidden_size is missing"),
        (lambda c: c["text_config"].update(hidden_size="64"), "hidden_size='64' .known: whole"),
        (lambda c: c.update(text_config=[]), "text_config.hidden_size is missing"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "be equal to the number of .lay"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
            "rope_type='yarn'",
        ),
    ],
)
def test_configs_it_does_not_know_are_refused_by_key(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(UnsupportedModelError, match=message):
        describe(spec_of(copy))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "audio_token_index", 20),
        ("", "image_token_index", 20),
        ("", "video_token_index", 20),
        ("", "audio_start_token_id", 20),
        ("", "audio_end_token_id", 20),
        ("", "vision_start_token_id", 20),
        ("", "position_id_per_seconds", 25),
        ("vision_config", "patch_size", 16),
        ("vision_config", "spatial_merge_size", 1),
        ("vision_config", "temporal_patch_size", 1),
        ("audio_config", "num_mel_bins", 80),
    ],
)
def test_config_and_processor_must_agree(copy: Path, part: str, key: str, value: int) -> None:
    edit_config(copy, lambda c: (c[part] if part else c).update({key: value}))
    with pytest.raises(UnsupportedModelError, match=f"disagree: {key} {value} against"):
        describe(spec_of(copy))
    if key == "vision_start_token_id":
        with pytest.raises(UnsupportedModelError, match="disagree"):
            load(spec_of(copy), "cpu")


UP = "layers.1.mlp.up_proj.weight"


def key_of(weights: dict[str, torch.Tensor]) -> str:
    return next(key for key in weights if key.endswith(UP))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(key_of(w)), r"json: 1 missing: \S*layers\.1\.mlp\.up_proj\.weight; fetch"),
        (
            lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}),
            r"json: 1 unknown: \S*layers\.9\.mlp\.up_proj\.weight; fetch",
        ),
        (
            lambda w: w.update({key_of(w).replace("up_", "upper_"): w.pop(key_of(w))}),
            r"1 missing: \S*mlp\.up_proj\.weight; 1 unknown: \S*mlp\.upper_proj\.weight; fetch",
        ),
    ],
    ids=["missing", "unknown", "renamed"],
)
def test_weights_that_are_not_the_thinkers_are_refused_by_name(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=message):
        load(spec_of(copy), "cpu")


def test_the_thinker_of_a_full_checkpoint_loads_the_same(checkpoint: Path, copy: Path) -> None:
    """The layout on the hub: `thinker.` keys, the thinker's config inside, a talker beside it."""
    # transformers itself saves the thinker under the hub's old names, less the prefix.
    saved = load_file(copy / "model.safetensors")
    weights = {f"thinker.{key}": tensor for key, tensor in saved.items()}
    weights["talker.thinker_to_talker_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((copy / "config.json").read_text())
    full = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": False}
    (copy / "config.json").write_text(json.dumps(full))
    whole, alone = (load(spec_of(at), "cpu").hf_model.state_dict() for at in (copy, checkpoint))
    assert whole.keys() == alone.keys()
    assert all(torch.equal(whole[name], alone[name]) for name in alone)


def test_unknown_families_paths_and_dtypes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt'; known: qwen2_5_omni"):
        describe(spec_of(checkpoint, family="gpt"))
    with pytest.raises(UnsupportedModelError, match="no folder"):
        describe(spec_of(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedModelError, match="holds no config"):
        describe(spec_of(tmp_path))
    with pytest.raises(UnsupportedModelError, match="dtype 'int8'"):
        load(spec_of(checkpoint, dtype="int8"), "cpu")
    assert resolve_path(spec_of(Path("Qwen/Qwen2.5-Omni-3B"))) == "Qwen/Qwen2.5-Omni-3B"


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    edit_config(copy, lambda c: c["text_config"].update(intermediate_size=256))
    message = r"12 of another shape than config.json says: .* \(64, 128\) for \(64, 256\)"
    with pytest.raises(UnsupportedModelError, match=message):
        load(spec_of(copy), "cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), OSError(5, "I/O"), MemoryError()]
)
def test_errors_of_the_machine_are_not_the_checkpoints(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """So that a worker elsewhere, or later, is given the model once more."""

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("avflow.workers.models.qwen2_5_omni.local_folder", broken)
    with pytest.raises(type(error)) as raised:
        load(spec_of(copy), "cpu")
    assert raised.value is error
