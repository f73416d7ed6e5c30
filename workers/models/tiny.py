"""A random checkpoint of a few hundred kilobytes, laid out as Hugging Face lays out the real ones.

The real classes of Qwen2.5-Omni with a small configuration, a real processor and a real byte-level
BPE tokenizer, so that every path from a media file to logits runs in a test without a download.
Random weights carry no information from media to answer: what is tested is arithmetic, not effect.

Geometry: 2 frames a second and 2 frames a temporal patch; frames of 56 x 56 pixels give 4 tokens
a patch; 20 mel frames and 5 audio tokens a second; chunks of 1 s.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

SAMPLE_RATE_HZ = 16_000
SIDE_PX = 56
MEL_PER_SECOND = 20
AUDIO_TOKENS_PER_SECOND = 5
LONGEST_AUDIO_S = 10
# Wider than the usual 0.02, at which a random model this small answers almost the same to anything.
_SPREAD = 0.1

SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
}

# As Qwen2.5-Omni's own template renders text, image, audio and video items.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif item['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif item['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# How Qwen2.5 cuts text before byte pairs are merged.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "system user assistant You are a helpful assistant.",
    "Which colour is shown while the sound is heard? Options: The best answer is:",
    *(f"{letter}. the first image\n" for letter in "ABCDEFGHIJ"),
    "red green blue yellow white black beep buzz hum click noise video audio image sound",
)


def build_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    n_layers: int = 8,
    hidden: int = 64,
    corpus: Iterable[str] = _CORPUS,
) -> Path:
    """Write config, safetensors, tokenizer and processor to `folder`; returns it.

    `hidden` must be a multiple of 32 (heads of 16). The same arguments give the same weights; the
    caller's random state is left as it was.
    """
    import torch

    processor = build_processor(build_tokenizer(corpus))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(processor.tokenizer, n_layers=n_layers, hidden=hidden)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_tokenizer(corpus: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of under 1000 tokens trained on `corpus`; any text tokenises."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    named = dict(SPECIAL_TOKENS)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=named.pop("pad_token"),
        eos_token=named.pop("eos_token"),
        extra_special_tokens=named,
        model_max_length=4096,
    )


def build_processor(tokenizer: Any, *, chat_template: str = CHAT_TEMPLATE) -> Any:
    """The real processor in the geometry above."""
    hf = _transformers()

    size = {"shortest_edge": SIDE_PX**2, "longest_edge": SIDE_PX**2}
    return hf.Qwen2_5OmniProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        feature_extractor=hf.WhisperFeatureExtractor(
            feature_size=32,
            sampling_rate=SAMPLE_RATE_HZ,
            hop_length=SAMPLE_RATE_HZ // MEL_PER_SECOND,
            chunk_length=LONGEST_AUDIO_S,
            n_fft=1024,
        ),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def build_model(tokenizer: Any, *, n_layers: int = 8, hidden: int = 64) -> Any:
    """The thinker with weights from torch's global generator, float32, in evaluation mode."""
    hf = _transformers()

    ids = {name: tokenizer.convert_tokens_to_ids(t) for name, t in SPECIAL_TOKENS.items()}
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": n_layers,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": hidden // 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
            },
            "pad_token_id": ids["pad_token"],
            "eos_token_id": ids["eos_token"],
            "tie_word_embeddings": False,
            "initializer_range": _SPREAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "initializer_range": _SPREAD,
        },
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "n_window": MEL_PER_SECOND // 2,
            "max_source_positions": LONGEST_AUDIO_S * MEL_PER_SECOND // 2,
            "output_dim": hidden,
            "initializer_range": _SPREAD,
        },
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=AUDIO_TOKENS_PER_SECOND,
        seconds_per_chunk=1,
        tie_word_embeddings=False,
        initializer_range=_SPREAD,
    )
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def _transformers() -> Any:
    """The library, imported late (it takes seconds) and untyped (its classes are only partly)."""
    import transformers

    return transformers
