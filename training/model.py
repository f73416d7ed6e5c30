"""The testbed's model and processor, untrained: the real classes of Qwen2.5-Omni, made tiny.

Geometry: 2 frames a second, so a second is one temporal patch of 2 x 2 video tokens; 20 mel frames
a second, so a second is 5 audio tokens and exactly one window of the audio tower. Neither encoder
lets a second see another: what passes between seconds passes in the decoder.
"""

import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from avflow.datasets.testbed.looks import SAMPLE_RATE_HZ, SIDE_PX
from avflow.datasets.testbed.questions import WORDING, matching_options
from avflow.datasets.testbed.samples import option_parts
from avflow.datasets.testbed.world import COLOURS, SOUNDS

CHECKPOINT = Path(__file__).parents[1] / "workers" / "models" / "testbed"
SYSTEM = "You are a helpful assistant."
HIDDEN, LAYERS = 96, 8
MEL_BINS, MEL_PER_SECOND, TOKENS_PER_SECOND = 64, 20, 5
VIDEO_TOKENS = 4  # a second, and an image
FPS = 2

_SPECIAL = {
    "pad_token": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
}

# Qwen2.5's own rule for cutting text before byte pairs are merged.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser trained on the prompts' own words; any text tokenises."""
    words = [f" {word}" for word in (*COLOURS, *SOUNDS)]
    options = [
        p.text
        for task in ("match_image", "match_sound")
        for w in [matching_options(task)]
        for p in option_parts(w)
    ]
    corpus = [SYSTEM, "system", "user", "assistant", *words, *options]
    corpus += [text.format("it") for text in WORDING.values()]
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
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            pad_token=_SPECIAL["pad_token"],
            eos_token=_SPECIAL["eos_token"],
            extra_special_tokens={
                name: token
                for name, token in _SPECIAL.items()
                if name.endswith("_token") and name not in ("pad_token", "eos_token")
            },
            model_max_length=2048,
        )


def build_processor() -> Qwen2_5OmniProcessor:
    """The real processor: 56 x 56 pixels a frame or image, 20 mel frames a second."""
    size = {"shortest_edge": SIDE_PX**2, "longest_edge": SIDE_PX**2}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size, fps=FPS, do_sample_frames=False),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS,
            sampling_rate=SAMPLE_RATE_HZ,
            hop_length=SAMPLE_RATE_HZ // MEL_PER_SECOND,
            chunk_length=8,
            n_fft=1024,
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The thinker, randomly initialised (from torch's global generator)."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _SPECIAL.items()}
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
            },
            "pad_token_id": ids["pad_token"],
            "eos_token_id": ids["eos_token"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [0, 1],
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "d_model": 64,
            "max_source_positions": 100,
            "n_window": MEL_PER_SECOND // 2,
            "output_dim": HIDDEN,
        },
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=TOKENS_PER_SECOND,
        seconds_per_chunk=1,
        tie_word_embeddings=False,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config)
