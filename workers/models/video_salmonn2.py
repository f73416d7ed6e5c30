"""video-SALMONN 2+ (3B and 7B), from the authors' released checkpoints, without their code.

Built from transformers' own parts: Qwen2.5-VL's vision and text, Whisper's encoder, a Q-Former.
Conformance with what the authors' code does (github.com/bytedance/video-SALMONN-2, folder
video_SALMONN2_plus) is recorded in tests/data/video_salmonn2; what differs on purpose is in
docs/models.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avflow.datasets.media import DecodedMedia, MediaSpec
from avflow.datasets.sample import Sample
from avflow.workers.models.base import (
    DTYPES,
    Decoder,
    Embedded,
    Family,
    Features,
    ModelInfo,
    ModelSpec,
    Prepared,
    UnsupportedModelError,
    with_media,
)
from avflow.workers.models.base import embed as embed_alone
from avflow.workers.models.checkpoint import describing_folder, local_folder
from avflow.workers.models.configs import config_json
from avflow.workers.models.placement import device_map, named
from avflow.workers.models.video_salmonn2_config import (
    MODEL_TYPES,
    own_frame_tokens,
    sizes,
)
from avflow.workers.models.video_salmonn2_prompt import (
    CLOSING,
    OPENING,
    PICTURE,
    SOUND,
    PromptMaker,
    prepare,
    prompt_maker,
)
from avflow.workers.models.video_salmonn2_weights import read_weights, refuse_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSalmonn:
    """A loaded video-SALMONN 2+: a `LoadedModel`."""

    spec: ModelSpec
    info: ModelInfo
    decoder: Decoder
    hf_model: nn.Module
    media_spec: MediaSpec
    device: torch.device
    maker: PromptMaker

    def prepare(self, sample: Sample, media: Sequence[DecodedMedia]) -> Prepared:
        """See `LoadedModel.prepare`."""
        return prepare(self.maker, sample, media)

    def official_inputs(self, prepared: Prepared) -> Mapping[str, object]:
        """See `LoadedModel.official_inputs`. transformers' own rule of positions is neither of
        this family's, so that they are always given, and with them the embeddings."""
        embedded = embed_alone(self, prepared)
        return {
            "inputs_embeds": embedded.inputs_embeds,
            "position_ids": embedded.position_ids,
            "attention_mask": embedded.attention_mask,
        }

    def token_text(self, token: int) -> str:
        """See `LoadedModel.token_text`."""
        text: str = self.maker.tokenizer.decode([token])
        return text

    @torch.no_grad()
    def encode(self, prepared: Prepared) -> Features:
        """See `LoadedModel.encode`: `video` and `audio`."""
        hf: Any = self.hf_model
        inputs = prepared.tensors
        tensors: dict[str, Tensor] = {}
        if "pixel_values_videos" in inputs:
            pixels = inputs["pixel_values_videos"].to(self.device, DTYPES[self.spec.dtype])
            grid = inputs["video_grid_thw"].to(self.device)
            tensors["video"] = hf.model.visual(pixels, grid_thw=grid).pooler_output
        if "input_features" in inputs:
            tensors["audio"] = hf.audio(inputs["input_features"].to(self.device))
        return Features(tensors=tensors)

    @torch.no_grad()
    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        """See `LoadedModel.embed`."""
        hf: Any = self.hf_model
        ids = prepared.tensors["input_ids"].to(self.device)
        place = {"video": hf.config.video_token_id, "audio": hf.config.audio_token_id}
        return Embedded(
            inputs_embeds=with_media(hf.get_input_embeddings(), ids, features, place),
            position_ids=prepared.tensors["position_ids"].to(self.device),
            attention_mask=prepared.tensors["attention_mask"].to(self.device),
            input_ids=ids,
        )


def describe(spec: ModelSpec) -> ModelInfo:
    """What planning needs. Everything but the weights is read, so that what is wrong with it is
    known before a sweep starts: raises UnsupportedModelError, as `load` does."""
    info = sizes(spec)
    _maker(spec, describing_folder(spec))
    return info


def _maker(spec: ModelSpec, folder: Path) -> PromptMaker:
    """The checkpoint's tokenizer, found to agree with its config, with the spec's settings."""
    refuse_adapter(spec, folder)
    config = config_json(folder)
    return prompt_maker(spec, config, _tokenizer(spec, str(folder), config))


def load(spec: ModelSpec, devices: Sequence[str]) -> VideoSalmonn:
    """Weights (safetensors alone, no code from the checkpoint) and tokenizer.

    The prompt enters on the first device. Raises UnsupportedModelError for a config,
    tokenizer or weights this family can't run.
    """
    info = sizes(spec)
    with local_folder(spec) as folder:
        maker = _maker(spec, folder)
        model = _model(spec, folder, config_json(folder), devices)
    text = model.model.language_model
    return VideoSalmonn(
        spec=spec,
        info=info,
        decoder=Decoder(
            layers=text.layers,
            rotary=text.rotary_emb,
            norm=text.norm,
            lm_head=model.lm_head,
            config=text.config,
        ),
        hf_model=model,
        media_spec=maker.media_spec,
        device=torch.device(devices[0]),
        maker=maker,
    )


def _model(spec: ModelSpec, folder: Path, config: dict[str, Any], devices: Sequence[str]) -> Any:
    """The module with the checkpoint's weights, every one of them accounted for."""
    import transformers

    from avflow.workers.models.video_salmonn2_net import VideoSalmonn2, meta_model

    hf: Any = transformers
    empty = meta_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    tied = frozenset({"lm_head.weight"} if config.get("tie_word_embeddings") else ())
    weights = read_weights(spec, folder, shapes, tied)
    # Its bar would be drawn over the sweep's own progress.
    hf.utils.logging.disable_progress_bar()
    model, report = VideoSalmonn2.from_pretrained(
        None,
        config=hf.Qwen2_5_VLConfig.from_dict(config),
        state_dict=weights,
        dtype=DTYPES[spec.dtype],
        # The encoders keep sdpa: a plain string would reach them too.
        attn_implementation={"text_config": spec.attention},
        device_map=device_map(parts(empty), devices),
        output_loading_info=True,
    )
    if lost := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise UnsupportedModelError(
            f"model {spec.name}: transformers {hf.__version__} did not take {len(lost)} weights: "
            f"{', '.join(lost[:5])} ..."
        )
    if (folder / "generation_config.json").is_file():  # for those who ask what it would change
        model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    model.eval().requires_grad_(False)
    return model


def parts(model: Any) -> list[tuple[str, nn.Module]]:
    """The model's parts by name, in the order in which a forward meets them."""
    text = model.model.language_model
    inside = [model.audio, model.model.visual, text.embed_tokens, text.rotary_emb, *text.layers]
    return named(model, (*inside, text.norm, model.lm_head))


def _tokenizer(spec: ModelSpec, folder: str, config: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer, found to mean the same tokens as its config."""
    import transformers

    hf: Any = transformers
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    words = {"video_token_id": PICTURE, "audio_token_id": SOUND,
             "vision_start_token_id": OPENING, "vision_end_token_id": CLOSING}  # fmt: skip
    wrong = [
        f"{key} is {config[key]} in config.json, {word} is {found} to the tokenizer"
        for key, word in words.items()
        if (found := tokenizer.convert_tokens_to_ids(word)) != config[key]
    ]
    if not tokenizer.is_fast:
        wrong.append("its tokenizer has no fast version, which alone knows where tokens lie")
    if wrong:
        raise UnsupportedModelError(
            f"model {spec.name}: {folder}: {'; '.join(wrong)}; take the tokenizer files that were "
            "released with the weights"
        )
    return tokenizer


FAMILY = Family(
    about="video-SALMONN 2+ (3B, 7B: the complete checkpoints, whose names end in _full)",
    model_types=MODEL_TYPES,
    describe=describe,
    load=load,
    own_frame_tokens=own_frame_tokens,
    layouts=("single_video",),
)
