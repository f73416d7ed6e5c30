"""Checkpoints that are not a whole video-SALMONN 2+ are refused, and every error says what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from salmonn import CONFIG, INDEX, SHARDS, change_config, spec_of, tiny_checkpoint
from torch import Tensor

from avflow.workers.models import describe, load
from avflow.workers.models.base import UnsupportedModelError
from avflow.workers.models.placement import device_map
from avflow.workers.models.tiny import build_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "salmonn")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the second shard, and the index to match."""
    weights = load_file(folder / SHARDS[1])
    change(weights)
    save_file(weights, folder / SHARDS[1], {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    first = {name: file for name, file in index["weight_map"].items() if file == SHARDS[0]}
    index["weight_map"] = first | dict.fromkeys(weights, SHARDS[1])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("model.norm.weight"), r"1 missing .*model\.language_model\.norm\.weight"),
        (
            lambda w: w.update({"audio.ln_speech.weight": torch.zeros(3)}),
            r"1 unknown: audio\.ln_speech\.weight",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(65)}),
            r"another shape than config\.json says: model\.norm\.weight \(65,\) for \(64,\)",
        ),
        (
            lambda w: w.update({"visual.merger.mlp.3.bias": w.pop("visual.merger.mlp.2.bias")}),
            r"1 missing .*model\.visual\.merger\.mlp\.2\.bias; 1 unknown: visual\.merger\.mlp\.3",
        ),
        (
            lambda w: w.update({"model.language_model.norm.weight": torch.zeros(64)}),
            r"comes a second time",
        ),
    ],
    ids=["missing", "unknown", "shape", "renamed", "twice"],
)
def test_weights_that_are_not_the_models_are_refused_by_name(
    broken: Path, change: Callable[[dict[str, Tensor]], None], complaint: str
) -> None:
    change_weights(broken, change)
    with pytest.raises(UnsupportedModelError, match=complaint):
        load(spec_of(broken), "cpu")


def test_q_tokens_are_needed_and_counted_numbers_are_not(broken: Path) -> None:
    for shard in SHARDS:
        weights = load_file(broken / shard)
        if "audio.q_tokens" in weights:
            weights.pop("audio.q_tokens")
            save_file(weights, broken / shard, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"1 missing .*audio\.q_tokens"):
        load(spec_of(broken), "cpu")


def test_a_missing_or_renamed_shard_is_named(broken: Path) -> None:
    (broken / SHARDS[1]).rename(broken / "model-2.safetensors")
    for use in (describe, load):
        with pytest.raises(UnsupportedModelError, match=f"{SHARDS[1]} is missing"):
            use(spec_of(broken))


def test_a_lora_repository_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"LoRA adapter .*q_tokens.*_full"):
        describe(spec_of(tmp_path))


def test_the_authors_lora_repositories_are_known_by_name() -> None:
    for size in ("3B", "7B", "72B"):
        adapter = spec_of(f"tsinghua-ee/video-SALMONN-2_plus_{size}")
        with pytest.raises(UnsupportedModelError, match=r"is a LoRA adapter, without audio\.q_t"):
            describe(adapter)


def test_every_weight_has_a_device() -> None:
    """Over several GPUs: a part of the model that none of the map's names holds would be lost."""
    from avflow.workers.models.video_salmonn2 import parts
    from avflow.workers.models.video_salmonn2_net import meta_model

    model = meta_model(CONFIG)
    held = device_map(parts(model), ("cuda:0", "cuda:1"))
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        assert sum(name == part or name.startswith(f"{part}.") for part in held) == 1, name
    assert held["audio"] == "cuda:0"  # the prompt enters there
    assert held["lm_head"] == "cuda:1"


def test_adapter_weights_under_a_whole_config_are_refused(broken: Path) -> None:
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    (broken / INDEX).unlink()
    save_file(lora, broken / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="the weights of a LoRA adapter"):
        load(spec_of(broken), "cpu")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"holds no config\.json"):
        describe(spec_of(tmp_path))


def test_another_familys_checkpoint_is_refused(tmp_path: Path) -> None:
    omni = build_tiny_checkpoint(tmp_path, n_layers=1)
    with pytest.raises(UnsupportedModelError, match="model_type 'qwen2_5_omni_thinker'"):
        describe(spec_of(omni))
    for option in ({"positions": "train"}, {"block_audio_padding": False}):
        with pytest.raises(UnsupportedModelError, match="options of video_salmonn2"):
            describe(spec_of(omni, family="qwen2_5_omni", **option))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, r"knows 'qwen2_5_vl' with"),
        ({"use_sliding_window": True}, r"use_sliding_window=True \(known: None, False\)"),
        ({"quantization_config": {}}, "quantization_config"),
        (
            {"audio_config": CONFIG["audio_config"] | {"second_stride": 0.25}},
            r"audio_config\.second_stride=0\.25 \(known: 0\.5\)",
        ),
        ({"audio_config": None}, r"audio_config\.d_model is missing"),
        (
            {"rope_scaling": {"rope_type": "yarn", "mrope_section": [2, 3, 3]}},
            "rope_type='yarn'",
        ),
    ],
)
def test_a_config_of_other_arithmetic_is_refused(
    broken: Path, changes: dict[str, Any], complaint: str
) -> None:
    change_config(broken, **changes)
    with pytest.raises(UnsupportedModelError, match=complaint):
        describe(spec_of(broken))


def test_a_tokenizer_of_other_ids_is_refused(broken: Path) -> None:
    change_config(broken, audio_token_id=3)
    with pytest.raises(UnsupportedModelError, match=r"audio_token_id is 3 in config\.json"):
        load(spec_of(broken), "cpu")
    with pytest.raises(UnsupportedModelError, match="dtype 'int8'"):
        load(spec_of(broken, dtype="int8"), "cpu")


def test_the_generation_config_is_the_checkpoints(broken: Path) -> None:
    wanted = {"repetition_penalty": 1.05, "eos_token_id": [2, 3]}
    (broken / "generation_config.json").write_text(json.dumps(wanted))
    hf: Any = load(spec_of(broken), "cpu").hf_model
    assert {key: getattr(hf.generation_config, key) for key in wanted} == wanted


def test_a_tied_head_may_be_left_out(broken: Path) -> None:
    """As in the 3B."""
    for shard in SHARDS:
        weights = load_file(broken / shard)
        if weights.pop("lm_head.weight", None) is not None:
            save_file(weights, broken / shard, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"1 missing .*lm_head\.weight"):
        load(spec_of(broken), "cpu")
    change_config(broken, tie_word_embeddings=True)
    tied = load(spec_of(broken), "cpu")
    hf: Any = tied.hf_model
    head: Any = tied.decoder.lm_head
    assert torch.equal(head.weight, hf.get_input_embeddings().weight)
    assert tied.info.parameters == sum(p.numel() for p in tied.hf_model.parameters())
