"""Qwen2.5-Omni: a sample and its decoded media to the processor's output and a layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avflow.datasets.media import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.pathways.layout import LayoutError
from avflow.workers.models.answers import answer_lead
from avflow.workers.models.base import Prepared
from avflow.workers.models.prompting import (
    TEMPLATE,
    Label,
    Prompt,
    Span,
    expand,
    layout_of,
    option_tokens,
    owners,
    render_prompt,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMaker:
    """What making a prompt takes: the checkpoint's processor and config, no weights.

    `answer_lead` comes before an answer's letter, see `answers`.
    """

    processor: Any
    config: Any
    media_spec: MediaSpec
    system_prompt: str
    answer_lead: str


def prompt_maker(
    processor: Any, config: Any, media_spec: MediaSpec, system_prompt: str
) -> PromptMaker:
    """A maker whose answers have the form that the checkpoint's chat template asks for."""
    rendered = _chat(processor, system_prompt, [{"type": "text", "text": "?"}])
    return PromptMaker(
        processor=processor,
        config=config,
        media_spec=media_spec,
        system_prompt=system_prompt,
        answer_lead=answer_lead(processor.tokenizer, rendered),
    )


def _chat(processor: Any, system_prompt: str, content: Sequence[Mapping[str, str]]) -> str:
    """The chat template's text up to where the answer begins."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system_prompt}]},
        {"role": "user", "content": content},
    ]
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def hears_videos(sample: Sample) -> bool:
    """Whether the sample's videos are interleaved with their sound."""
    return any(part.with_audio for part in sample.media)


def prepare(maker: PromptMaker, sample: Sample, media: Sequence[DecodedMedia]) -> Prepared:
    """Processor output and layout of one sample, on the CPU. Raises LayoutError, MediaError."""
    tokenizer = maker.processor.tokenizer
    _check_media(sample, media)
    prompt = _rendered(maker, sample)
    tensors = _process(maker, prompt, media)
    ids: list[int] = tensors["input_ids"][0].tolist()
    longest = maker.config.text_config.max_position_embeddings
    if len(ids) > longest:
        raise MediaError(
            f"sample {sample.sample_id}: {len(ids)} tokens, the model takes {longest}; lower "
            "max_frames, fps or frame_tokens"
        )
    expanded = expand(prompt, _replacements(maker, sample, ids))
    coded = tokenizer(expanded.text, return_offsets_mapping=True)
    if coded["input_ids"] != ids:
        raise LayoutError(
            f"sample {sample.sample_id}: the tokenizer reads the expanded prompt otherwise than "
            "the processor did, so its tokens can't be located"
        )
    offsets = [(int(start), int(stop)) for start, stop in coded["offset_mapping"]]
    markers = set(tokenizer.convert_tokens_to_ids(_marker_words(maker.processor)))
    layout = layout_of(
        expanded,
        offsets,
        _media_labels(maker, expanded, offsets, ids, tensors),
        [token in markers for token in ids],
    )
    return Prepared(
        sample=sample,
        tensors=tensors,
        layout=layout,
        option_tokens=option_tokens(tokenizer, prompt, maker.answer_lead),
        prompt=expanded.text,
        offsets=torch.tensor(offsets, dtype=torch.int64),
    )


def _check_media(sample: Sample, media: Sequence[DecodedMedia]) -> None:
    wanted, given = [part.kind for part in sample.media], [item.kind for item in media]
    if wanted != given:
        raise MediaError(f"sample {sample.sample_id}: decoded media are {given}, parts {wanted}")
    if len({part.with_audio for part in sample.media if part.kind == "video"}) > 1:
        raise MediaError(
            f"sample {sample.sample_id}: Qwen2.5-Omni takes the sound of all videos of a prompt or "
            "of none; set with_audio alike"
        )
    spacings = {item.seconds_per_frame for item in media if item.kind == "video"}
    if len(spacings) > 1:
        raise MediaError(
            f"sample {sample.sample_id}: its videos are sampled every "
            f"{' and '.join(sorted(map(str, spacings)))} s, but the processor takes one rate a "
            "prompt; raise max_frames or lower fps"
        )


def _marker_words(processor: Any) -> list[str]:
    """The tokens that open and close media."""
    return [
        processor.vision_bos_token,
        processor.vision_eos_token,
        processor.audio_bos_token,
        processor.audio_eos_token,
    ]


def _rendered(maker: PromptMaker, sample: Sample) -> Prompt:
    """The chat template's text, one placeholder a medium."""
    processor = maker.processor

    def render(texts: Sequence[str]) -> str:
        words = iter(texts)
        content = [
            {"type": "text", "text": next(words)}
            if isinstance(part, TextPart)
            else {"type": part.kind}
            for part in sample.parts
        ]
        return _chat(processor, maker.system_prompt, content)

    return render_prompt(
        sample,
        render,
        {
            "video": processor.video_token,
            "audio": processor.audio_token,
            "image": processor.image_token,
        },
        sorted(processor.tokenizer.get_added_vocab()),
    )


def _process(
    maker: PromptMaker, prompt: Prompt, media: Sequence[DecodedMedia]
) -> dict[str, Tensor]:
    """The processor's outputs by name, from the media in prompt order."""
    spec = maker.media_spec
    videos = [item for item in media if item.kind == "video"]
    images = [item.frames[0] for item in media if item.kind == "image" and item.frames is not None]
    waves, sources, n_videos = [], [], 0  # a sound's source: the number of its video, or None
    for item in media:
        if item.waveform is not None:
            waves.append(item.waveform)
            sources.append(n_videos if item.kind == "video" else None)
        n_videos += item.kind == "video"
    spacing = videos[0].seconds_per_frame if videos else None
    interleaving, for_videos = _interleaving(maker, prompt.sample, sources)
    batch = maker.processor(
        text=[prompt.text],
        videos=[item.frames for item in videos] or None,
        images=images or None,
        audio=waves or None,
        images_kwargs={
            "size": {"shortest_edge": spec.image_min_pixels, "longest_edge": spec.image_max_pixels}
        },
        videos_kwargs={
            # Left out, the processor would assume 2 frames a second whatever was sampled.
            "fps": 1 / spacing if spacing else spec.fps,
            "do_sample_frames": False,
            "size": {"shortest_edge": spec.frame_min_pixels, "longest_edge": spec.frame_max_pixels},
            **for_videos,
        },
        audio_kwargs={"sampling_rate": spec.sample_rate},
        return_tensors="pt",
        **interleaving,
    )
    tensors = {str(name): torch.as_tensor(value) for name, value in batch.items()}
    _check_frames(prompt.sample, videos, tensors, spec)
    _check_sounds(prompt.sample, tensors)
    return tensors


def _interleaving(
    maker: PromptMaker, sample: Sample, sources: Sequence[int | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the processor, and its `videos_kwargs`, that weave sounds into their videos."""
    clock = {
        "seconds_per_chunk": float(maker.config.seconds_per_chunk),
        "position_id_per_seconds": maker.config.position_id_per_seconds,
    }
    if not hasattr(maker.processor, "load_audio_from_video"):  # before transformers 5.23
        return {}, {"use_audio_in_video": hears_videos(sample), **clock}
    whose = {
        "load_audio_from_video": hears_videos(sample),
        "audio_from_video_indices": list(sources) or None,
    }
    return {**whose, **clock}, {"cap_pixels_per_frame": False}


def _check_frames(
    sample: Sample, videos: Sequence[DecodedMedia], tensors: dict[str, Tensor], spec: MediaSpec
) -> None:
    """The processor's time axis must be that of the frames really sampled."""
    for number, video in enumerate(videos):
        if video.frames is None or video.seconds_per_frame is None:
            raise MediaError(f"sample {sample.sample_id}: video {number} was decoded to no frames")
        rows = int(tensors["video_grid_thw"][number, 0])
        step = float(tensors["video_second_per_grid"][number])
        true_rows = len(video.frames) / spec.temporal_patch
        true_step = video.seconds_per_frame * spec.temporal_patch
        if rows != true_rows or abs(step - true_step) > 1e-6 * true_step:
            raise MediaError(
                f"sample {sample.sample_id}: the processor made {rows} frame pairs of {step} s, "
                f"sampled were {true_rows} of {true_step} s"
            )


def _check_sounds(sample: Sample, tensors: dict[str, Tensor]) -> None:
    if "feature_attention_mask" not in tensors:
        return
    for number, mel in enumerate(tensors["feature_attention_mask"].sum(dim=1).tolist()):
        if mel < 3:  # two halvings leave nothing
            raise MediaError(
                f"sample {sample.sample_id}: sound {number} is too short to give a token "
                f"({mel} mel frames); leave the sample out"
            )


def _replacements(maker: PromptMaker, sample: Sample, ids: Sequence[int]) -> list[str]:
    """What the processor put for each medium, read back from its tokens."""
    processor, config = maker.processor, maker.config
    word = {
        config.image_token_index: processor.image_token,
        config.audio_token_index: processor.audio_token,
        config.video_token_index: processor.video_token,
    }
    found, at = [], 0
    for part in sample.media:
        while at < len(ids) and ids[at] not in word:
            at += 1
        start = at
        while at < len(ids) and ids[at] in word:
            at += 1
        run = "".join(word[token] for token in ids[start:at])
        sound = part.kind == "video" and part.with_audio
        found.append(processor.audio_bos_token + run + processor.audio_eos_token if sound else run)
    return found


def _media_labels(
    maker: PromptMaker,
    prompt: Prompt,
    offsets: Sequence[Span],
    ids: Sequence[int],
    tensors: dict[str, Tensor],
) -> dict[int, list[Label]]:
    """By number of a media part, the label of each of its tokens."""
    own: dict[int, list[int]] = {}
    for token, number in zip(ids, owners(prompt, offsets), strict=True):
        if number is not None:
            own.setdefault(number, []).append(token)
    clip = _ClipLabels(maker)
    row_tokens = iter((tensors["video_grid_thw"][:, 1:].prod(dim=1) // clip.merged).tolist()
                      if "video_grid_thw" in tensors else ())  # fmt: skip
    labels: dict[int, list[Label]] = {}
    for number, part in enumerate(prompt.sample.parts):
        if not isinstance(part, MediaPart):
            continue
        tokens = own.get(number, [])
        row = next(row_tokens) if part.kind == "video" else max(len(tokens), 1)
        if part.role == "clip":
            labels[number] = clip.of(tokens, row)
        elif part.role == "candidate" and part.index is None:
            raise LayoutError(f"sample {prompt.sample.sample_id}: {part.path} has no index")
        else:
            labels[number] = [
                (part.role, part.index) if token in clip.media else TEMPLATE for token in tokens
            ]
    return labels


class _ClipLabels:
    """Numbers the frames and sound chunks of a prompt's clips, in order."""

    def __init__(self, maker: PromptMaker) -> None:
        config = maker.config
        self.sound = config.audio_token_index
        self.media = {config.image_token_index, config.video_token_index, self.sound}
        self.merged = config.vision_config.spatial_merge_size**2
        self._chunk = int(config.position_id_per_seconds * config.seconds_per_chunk)
        self._frames = self._chunks = 0

    def of(self, tokens: Sequence[int], row: int) -> list[Label]:
        """A label a token; `row` visual tokens make a frame, the processor's count a chunk.

        Where frame pairs lie further apart than a chunk lasts (long videos with few frames), the
        processor cuts every frame after its first token and lets the picture run ahead of the
        sound. That is how the model is given it, so such a frame is one frame in two pieces.
        """
        labels: list[Label] = []
        seen = heard = 0
        for token in tokens:
            if token == self.sound:
                labels.append(("audio_chunk", self._chunks + heard // self._chunk))
                heard += 1
            elif token in self.media:
                labels.append(("frame", self._frames + seen // row))
                seen += 1
            else:
                labels.append(TEMPLATE)
        self._frames += -(-seen // row)
        self._chunks += -(-heard // self._chunk)
        return labels
