"""Checkpoints of video-SALMONN 2+ in the released layout; one of them the authors' code ran."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from avflow.datasets.sample import MediaKind, MediaPart, Sample, TextPart
from avflow.workers.models.base import ModelSpec

RECORDED = Path(__file__).parent / "data" / "video_salmonn2"
CASES: dict[str, dict[str, Any]] = json.loads((RECORDED / "cases.json").read_text())
CONFIG: dict[str, Any] = json.loads((RECORDED / "config.json").read_text())
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
           "<|audio_pad|>")  # fmt: skip
# As the recorded checkpoint's tokenizer numbered them; words by the recorded ids.
SMALL_IDS = dict(zip(SPECIAL, (1, 2, 3, 4, 6, 7), strict=True)) | {"\n": 8}
WORDS = {
    "system": 87, "You": 27, "are": 22, "a": 107, "helpful": 12, "assistant.": 142, "user": 157,
    "assistant": 96, "What": 114, "happens": 11, "here": 130, "?": 73, "Describe": 61, "the": 31,
    "sound": 113, ".": 56, "do": 71, "you": 59, "hear": 126,
}  # fmt: skip


def spec_of(folder: Path | str, **changes: Any) -> ModelSpec:
    fields = {"name": "tiny", "family": "video_salmonn2", "path": str(folder), "dtype": "float32"}
    return ModelSpec(**(fields | {"frame_tokens": None} | changes))


def sample_of(
    question: str = "What happens here ?",
    kind: MediaKind = "video",
    *,
    with_audio: bool = True,
    options: tuple[TextPart, ...] = (),
) -> Sample:
    return Sample(
        sample_id="s1",
        dataset="d",
        task="t",
        category="c",
        layout="single_video",
        parts=(
            MediaPart(kind=kind, path="clip.mp4", with_audio=with_audio and kind == "video"),
            TextPart(role="question", text=question),
            *options,
        ),
        answer=0,
        media_group="g",
    )


def word_tokenizer(ids: Mapping[str, int]) -> Any:
    """A word a token, by these ids; the line's end is a word, spaces are none."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(Regex(" "), "removed"),
        ]
    )
    # As in the released files: the sound's token was added later, and is not flagged special.
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL[:-1]])
    tokenizer.add_tokens([AddedToken(SPECIAL[-1], special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_checkpoint(
    folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], tokenizer: Any
) -> Path:
    """A folder as the authors release it: a flat config, two shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    held = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {name: shard for shard, some in zip(SHARDS, held, strict=True) for name in some}
    for shard, some in zip(SHARDS, held, strict=True):
        save_file({name: weights[name] for name in some}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that the authors' code was run on."""
    weights = load_file(RECORDED / "weights.safetensors")
    ids = {"<pad>": 0, "<unk>": 159} | SMALL_IDS | WORDS
    return write_checkpoint(folder, weights, CONFIG, word_tokenizer(ids))


def tiny_checkpoint(folder: Path) -> Path:
    """The recorded encoders and decoder with a byte-level tokenizer's vocabulary, so that any
    text can be asked. Embeddings are random: nothing is known, all is arithmetic."""
    from transformers import AddedToken

    from avflow.workers.models.tiny import build_tokenizer

    tokenizer = build_tokenizer(["Which colour is shown? The best answer is:", "A. B. C. D."])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:-1])})
    tokenizer.add_tokens([AddedToken(SPECIAL[-1], special=False)])
    token = tokenizer.convert_tokens_to_ids
    vocabulary = {
        "vocab_size": len(tokenizer),
        "video_token_id": token("<|video_pad|>"),
        "audio_token_id": token("<|audio_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }
    weights = load_file(RECORDED / "weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, spread in (("model.embed_tokens.weight", 1.0), ("lm_head.weight", 0.3)):
        shape = (len(tokenizer), weights[name].shape[1])
        weights[name] = torch.randn(*shape, generator=generator) * spread
    return write_checkpoint(folder, weights, CONFIG | vocabulary, tokenizer)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
