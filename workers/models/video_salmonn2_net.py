"""video-SALMONN 2+ as a module: Qwen2.5-VL with Whisper's encoder and a window-level Q-Former.

Every part is transformers' own; what is new is how the sound's windows become tokens (the
authors' `modeling_whisper.py`). Imports transformers, so it is itself imported late.

Shapes: C blocks of 30 s, A = 60 C audio tokens, D hidden size of the text model.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avflow.workers.models.video_salmonn2_positions import TOKENS_PER_BLOCK

_hf: Any = transformers


class AudioTower(nn.Module):
    """Whisper's encoder, then one query of a Q-Former for each window of half a second."""

    def __init__(self, config: dict[str, Any], out_size: int) -> None:
        """`config` is `audio_config` of the checkpoint's config.json."""
        super().__init__()
        sizes = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
                 "num_mel_bins", "max_source_positions")  # fmt: skip
        whisper = _hf.WhisperConfig(**{name: config[name] for name in sizes})
        self.encoder = WhisperEncoder(whisper)
        former = config["qformer_config"]
        kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "hidden_act", "layer_norm_eps")  # fmt: skip
        self.qformer = _hf.Blip2QFormerModel(
            _hf.Blip2QFormerConfig(
                **{name: former[name] for name in kept},
                encoder_hidden_size=config["d_model"],
                cross_attention_frequency=1,
                use_qformer_text_input=False,
            )
        )
        self.q_tokens = nn.Parameter(torch.zeros(1, 1, former["hidden_size"]))
        self.audio_proj = nn.Linear(former["hidden_size"], out_size)

    def forward(self, mel: Tensor) -> Tensor:
        """[C, mel bins, 3000] to [A, D]. Windows don't overlap, and nothing crosses them here."""
        heard = self.encoder(mel.to(self.q_tokens.dtype)).last_hidden_state  # [C, 1500, d_model]
        windows = heard.reshape(len(mel) * TOKENS_PER_BLOCK, -1, heard.shape[2])
        queries = self.q_tokens.expand(len(windows), -1, -1)
        answers = self.qformer(query_embeds=queries, encoder_hidden_states=windows)
        tokens: Tensor = self.audio_proj(answers.last_hidden_state).flatten(0, 1)
        return tokens


class VideoSalmonn2(_hf.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """The official Qwen2.5-VL beside `audio`. Its own forward takes embeddings and positions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.audio = AudioTower(config.audio_config, config.text_config.hidden_size)


def meta_model(config: dict[str, Any]) -> VideoSalmonn2:
    """The model that this config.json describes, without memory for its weights."""
    with torch.device("meta"):
        return VideoSalmonn2(_hf.Qwen2_5_VLConfig.from_dict(config))
