"""Qwen2.5-Omni (the thinker), as Hugging Face's transformers implements it.

One video with its sound is interleaved in chunks of `seconds_per_chunk`: the chunk's frame pairs,
then its audio tokens. What transformers would let pass silently is checked here: the frame rate it
assumes, the positions it computes from a missing argument, special tokens that differ between
config and tokenizer. Runs with transformers 5.17 and 5.23.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avflow.datasets.media import DecodedMedia, MediaSpec
from avflow.datasets.sample import Sample
from avflow.pathways.layout import LayoutError
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
from avflow.workers.models.checkpoint import describing_folder, local_folder
from avflow.workers.models.configs import config_json
from avflow.workers.models.placement import device_map, named
from avflow.workers.models.qwen2_5_omni_config import (
    FRAME_TOKENS,
    MODEL_TYPES,
    UNUSED,
    check_agreement,
    media_spec,
    meta_thinker,
    sizes,
    thinker_config,
)
from avflow.workers.models.qwen2_5_omni_prompt import (
    PromptMaker,
    hears_videos,
    prepare,
    prompt_maker,
)

# What the official chat template puts where no system message is given.
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
_SHOWN = 5  # weights named in an error


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenOmni:
    """A loaded thinker: a `LoadedModel`."""

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
        """See `LoadedModel.official_inputs`."""
        tensors = {name: tensor.to(self.device) for name, tensor in prepared.tensors.items()}
        return {**tensors, "use_audio_in_video": hears_videos(prepared.sample)}

    def token_text(self, token: int) -> str:
        """See `LoadedModel.token_text`."""
        text: str = self.maker.processor.tokenizer.decode([token])
        return text

    def encode(self, prepared: Prepared) -> Features:
        """See `LoadedModel.encode`."""
        return encode(self, prepared)

    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        """See `LoadedModel.embed`."""
        return embed(self, prepared, features)


def describe(spec: ModelSpec) -> ModelInfo:
    """What planning needs. Everything but the weights is read, so that what is wrong with it is
    known before a sweep starts: raises UnsupportedModelError, as `load` does."""
    info = sizes(spec)
    _maker(spec, describing_folder(spec))
    return info


def _maker(spec: ModelSpec, folder: Path) -> PromptMaker:
    """The checkpoint's processor, found to agree with its config, with the spec's settings."""
    import transformers

    hf: Any = transformers
    processor = hf.Qwen2_5OmniProcessor.from_pretrained(folder)
    config = thinker_config(config_json(folder))
    check_agreement(spec, config, processor)
    system = DEFAULT_SYSTEM_PROMPT if spec.system_prompt is None else spec.system_prompt
    return prompt_maker(processor, config, media_spec(spec, processor), system)


def load(spec: ModelSpec, devices: Sequence[str]) -> QwenOmni:
    """Weights (safetensors alone, no code from the checkpoint) and processor.

    The prompt enters on the first device. Raises UnsupportedModelError for a config, weights or
    a processor this family can't run.
    """
    import transformers

    hf: Any = transformers
    info = sizes(spec)
    # Its bar would be drawn over the sweep's own progress.
    hf.utils.logging.disable_progress_bar()
    with local_folder(spec, UNUSED) as folder:
        maker = _maker(spec, folder)
        model, report = hf.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            folder,
            dtype=DTYPES[spec.dtype],
            # The encoders keep sdpa: a plain string would reach them too.
            attn_implementation={"text_config": spec.attention},
            device_map=device_map(_parts(meta_thinker(config_json(folder))), devices),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    _refuse_other_weights(spec, report)
    model.eval().requires_grad_(False)
    text = _text_model(model)
    return QwenOmni(
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


def _refuse_other_weights(spec: ModelSpec, report: Mapping[str, Any]) -> None:
    """Every weight of the thinker must have been there, in its shape; none of it left over."""
    left_over = {key for key in report["unexpected_keys"] if not key.startswith(UNUSED)}
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "unknown": sorted(left_over),
        "of another shape than config.json says": sorted(
            f"{key} {tuple(found)} for {tuple(expected)}"
            for key, found, expected in report["mismatched_keys"]
        ),
    }
    if any(wrong.values()):
        listed = (
            f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' * (len(keys) > _SHOWN)}"
            for what, keys in wrong.items()
            if keys
        )
        raise UnsupportedModelError(
            f"model {spec.name}: the weights in {spec.path} are not those of its config.json: "
            f"{'; '.join(listed)}; fetch the checkpoint again"
        )


def _text_model(model: Any) -> Any:
    """Before transformers 5.21 the thinker held its encoders itself, beside the text model."""
    return getattr(model.model, "language_model", model.model)


def _parts(model: Any) -> list[tuple[str, nn.Module]]:
    """The thinker's parts by name, in the order in which a forward meets them."""
    text = _text_model(model)
    holder = model.model if hasattr(model.model, "visual") else model
    inside = [holder.audio_tower, holder.visual, text.embed_tokens, text.rotary_emb, *text.layers]
    return named(model, (*inside, text.norm, model.lm_head))


@torch.no_grad()
def encode(model: QwenOmni, prepared: Prepared) -> Features:
    """The encoders' outputs as the official forward takes them: `audio`, `image`, `video`."""
    hf: Any = model.hf_model
    inputs = {name: tensor.to(model.device) for name, tensor in prepared.tensors.items()}
    tensors: dict[str, Tensor] = {}
    if "input_features" in inputs:
        tensors["audio"] = hf.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"], return_dict=True
        ).last_hidden_state
    if "pixel_values" in inputs:
        tensors["image"] = torch.cat(
            hf.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            ).pooler_output
        )
    if "pixel_values_videos" in inputs:
        tensors["video"] = torch.cat(
            hf.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            ).pooler_output
        )
    return Features(tensors=tensors)


@torch.no_grad()
def embed(model: QwenOmni, prepared: Prepared, features: Features) -> Embedded:
    """The decoder's inputs as the official forward makes them. Raises LayoutError."""
    hf: Any = model.hf_model
    ids = prepared.tensors["input_ids"].to(model.device)
    place = {
        "audio": hf.config.audio_token_id,
        "image": hf.config.image_token_id,
        "video": hf.config.video_token_id,
    }
    return Embedded(
        inputs_embeds=with_media(hf.get_input_embeddings(), ids, features, place),
        position_ids=_positions(hf, prepared).to(model.device),
        attention_mask=prepared.tensors["attention_mask"].to(model.device),
        input_ids=ids,
    )


def _positions(hf: Any, prepared: Prepared) -> Tensor:
    """int64 [3, 1, N]: time, height, width. On the CPU, with every argument given.

    Left out, `attention_mask`, `use_audio_in_video` or the seconds a frame pair would change the
    result without a word. What a prompt before has left in the model (`rope_deltas`) is not read.
    """
    inputs = prepared.tensors
    mel = inputs.get("feature_attention_mask")
    positions, _ = hf.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=hears_videos(prepared.sample),
        audio_seqlens=None if mel is None else mel.sum(dim=1),
        second_per_grids=inputs.get("video_second_per_grid"),
    )
    n = inputs["input_ids"].shape[1]
    if positions.shape != (3, 1, n):
        raise LayoutError(f"positions are {tuple(positions.shape)}, expected (3, 1, {n})")
    _check_sound_clock(hf.config, inputs["input_ids"][0], positions[0, 0])
    result: Tensor = positions
    return result


def _check_sound_clock(config: Any, ids: Tensor, times: Tensor) -> None:
    """A sound's i-th token must come i steps after the start of its block.

    Processor and model cut a video into chunks separately, in different precision; where they
    disagree, positions of frames would land on sound.
    """
    opened = (ids == config.audio_start_token_id).nonzero()[:, 0].tolist()
    closed = (ids == config.audio_end_token_id).nonzero()[:, 0].tolist()
    for start, stop in zip(opened, closed, strict=True):
        block = times[start + 1 : stop]
        sound = block[ids[start + 1 : stop] == config.audio_token_id]
        if not torch.equal(sound, block[0] + torch.arange(len(sound))):
            raise LayoutError(
                "processor and model cut the video and its sound into different chunks; change "
                "fps or max_frames a little"
            )


FAMILY = Family(
    about="Qwen2.5-Omni's Thinker (3B, 7B, a folder like theirs; `testbed`: the shipped one)",
    model_types=MODEL_TYPES,
    describe=describe,
    load=load,
    own_frame_tokens=lambda _frames, _max_frames: FRAME_TOKENS,
)
