"""`avflow models`: what is listed, and what checking a checkpoint says and returns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub, serving
from in_process import avflow
from safetensors.torch import load_file, save_file
from tiny_models import SHARDS, as_published

from avflow.orchestrator.known_models import PAPER_TOKENS, PUBLISHED, Published, needed_bytes
from avflow.workers.models import FAMILIES
from avflow.workers.models.qwen2_5_omni_config import meta_thinker
from avflow.workers.models.tiny import build_tiny_checkpoint
from avflow.workers.models.video_salmonn2_net import meta_model


def models(*words: object) -> tuple[int, str]:
    """`avflow models` in this process; its exit status and everything it printed."""
    done = avflow("models", *words, columns=100)
    return done.returncode, done.said


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=3)


def test_the_list_names_families_checkpoints_and_what_they_need() -> None:
    status, text = models()
    assert status == 0
    for word in (*FAMILIES, "Qwen/Qwen2.5-Omni-7B", "8.93 B", "Apache-2.0", "testbed"):
        assert word in text
    status, text = models("--json")
    rows = {row["checkpoint"]: row for row in json.loads(text)["checkpoints"]}
    assert rows["Qwen/Qwen2.5-Omni-3B"]["info"]["n_layers"] == 36
    assert rows["Qwen/Qwen2.5-Omni-3B"]["needed_bytes"] > 2 * 4_703_464_448


def meta_of(known: Published) -> Any:
    """The official classes built from the published shapes, without memory."""
    info = known.info
    text = {
        "num_hidden_layers": info.n_layers,
        "hidden_size": info.hidden_size,
        "num_attention_heads": info.n_heads,
        "num_key_value_heads": info.n_kv_heads,
        "intermediate_size": info.intermediate_size,
        "vocab_size": info.vocab_size,
    }
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision["out_hidden_size"] = info.hidden_size
    if known.family == "qwen2_5_omni":
        audio = {"output_dim": info.hidden_size}
        return meta_thinker({"text_config": text, "vision_config": vision, "audio_config": audio})
    if info.hidden_size == 8192:
        vision["intermediate_size"] = 3456
    qformer = {
        "hidden_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12,
        "intermediate_size": 12288, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "query_length": 1,
    }  # fmt: skip
    whisper = {
        "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120, "max_source_positions": 1500, "second_per_window": 0.5,
        "second_stride": 0.5, "qformer_config": qformer,
    }  # fmt: skip
    tied = info.hidden_size == 2048
    return meta_model(
        {**text, "tie_word_embeddings": tied, "vision_config": vision, "audio_config": whisper}
    )


@pytest.mark.parametrize("known", PUBLISHED, ids=lambda known: known.checkpoint)
def test_published_counts_follow_from_the_published_shapes(known: Published) -> None:
    assert known.family in FAMILIES
    assert sum(p.numel() for p in meta_of(known).parameters()) == known.info.parameters


def test_a_published_fine_tune_holds_as_many_parameters() -> None:
    """The Thinker alone, in the bytes that its model.safetensors.index.json tells (total_size)."""
    assert PUBLISHED[1].info.weight_bytes("bfloat16") == 17_863_627_776


def test_memory_counts_weights_keys_and_values_at_the_papers_size() -> None:
    """64 frame pairs of 144 tokens, 64 s of sound at 25 a second."""
    assert PAPER_TOKENS - 64 * 144 - 64 * 25 == 200
    info = PUBLISHED[1].info
    weights, cache = info.parameters * 2, PAPER_TOKENS * 28 * 2 * 4 * 128 * 2
    assert weights + cache < needed_bytes(info, "bfloat16") < (weights + cache) * 1.25
    assert needed_bytes(info, "bfloat16", 100) < needed_bytes(info, "bfloat16")


@pytest.mark.parametrize("published", [False, True])
def test_a_sound_checkpoint_is_recognised_and_passes(
    tiny: Path, tmp_path: Path, published: bool
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    if published:
        as_published(folder)
    status, text = models("check", folder, "--dtype", "float32")
    assert status == 0, text
    assert text.startswith("qwen2_5_omni: 3 layers of 64")
    assert "56 checks, 0 failed" in text


def test_a_failed_check_is_exit_status_3(tiny: Path, tmp_path: Path) -> None:
    """An LM head that is constant answers the same whatever is blocked."""
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    status, text = models("check", folder, "--dtype", "float32", "--json")
    assert status == 3
    failed = {c["name"] for c in json.loads(text)["checks"] if c["result"] == "failed"}
    assert failed == {"blocking all before last changes it"}


def test_what_is_no_checkpoint_is_exit_status_2(tiny: Path, tmp_path: Path) -> None:
    assert models("check", tmp_path)[0] == 2
    for change, says in (
        ({"model_type": "llama"}, "model_type is 'llama', which no family knows"),
        ({"model_type": "qwen2_5_vl"}, "video_SALMONN2_plus"),
    ):
        folder = Path(shutil.copytree(tiny, tmp_path / change["model_type"]))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        status, text = models("check", folder)
        assert (status, says in text) == (2, True), text
    status, text = models("check", tiny, "--family", "gpt")
    assert (status, "no family 'gpt'" in text) == (2, True)
    (tmp_path / "llama" / "model.safetensors").unlink()
    status, text = models("check", tmp_path / "llama", "--family", "qwen2_5_omni")
    assert (status, "model.safetensors is missing" in text) == (2, True)


ASKING = """
from avflow.workers.models import describe
from avflow.workers.models.base import ModelSpec, UnsupportedModelError
for revision in (None, "v2"):
    try:
        describe(ModelSpec(name="m", family="qwen2_5_omni", path="Qwen/Tiny", revision=revision))
    except UnsupportedModelError as error:
        print(error)
"""


def on_hub(hub: Hub, home: Path, *words: str) -> tuple[int, str]:
    """Run Python in a process of its own: the hub's library reads its environment once."""
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | here, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_of_a_hubs_checkpoint_only_what_is_loaded_is_fetched(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    as_published(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub = Hub(repository="Qwen/Tiny", files=files, kind="models")
    with serving(hub):
        lost = hub.files.pop(SHARDS[1])
        _, said = on_hub(hub, tmp_path / "hf", "-c", ASKING)
        assert "Qwen/Tiny at 'v2': the hub has no such id, revision" in said
        assert f"has no {SHARDS[1]}" in said
        assert not set(SHARDS) & set(hub.sent), "before any weights are fetched"
        hub.files[SHARDS[1]] = lost
        lost = hub.files.pop("tokenizer.json")
        _, said = on_hub(hub, tmp_path / "hf", "-c", ASKING)
        assert f"Qwen/Tiny at {COMMIT} lacks files" in said
        assert "no tokenizer.json" in said
        hub.files["tokenizer.json"] = lost
        words = ("-m", "avflow", "models", "check", "Qwen/Tiny", "--dtype", "float32")
        status, said = on_hub(hub, tmp_path / "hf", *words)
        assert (status, "0 failed" in said) == (0, True), said
        assert {SHARDS[0], SHARDS[1]} < set(hub.sent)
        assert not {SHARDS[2], "spk_dict.pt"} & set(hub.sent)


@pytest.mark.slow
def test_a_hub_that_is_gone_leaves_what_was_fetched(tiny: Path, tmp_path: Path) -> None:
    """The hub's library tries for half a minute before it gives up."""
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    hub = Hub(repository="Qwen/Tiny", files=files, kind="models")
    with serving(hub):
        words = ("-m", "avflow", "models", "check", "Qwen/Tiny", "--dtype", "float32")
        assert on_hub(hub, tmp_path / "hf", *words)[0] == 0
    _, said = on_hub(hub, tmp_path / "hf", "-c", ASKING)
    assert "model m: Qwen/Tiny at 'v2': neither the hub nor the local cache gives it" in said
    assert said.count("model m:") == 1, "what was fetched is used"
