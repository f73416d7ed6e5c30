"""video-SALMONN 2+: a sample and its decoded media to tensors, positions and a layout.

One video, with or without its sound, or one sound: the authors' `LazySupervisedDataset`. The
sound is cut into blocks of 30 s of which the last is filled up with silence, and the model reads
all of them unmasked; tokens of that silence are `audio_padding` to the layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.datasets.media import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sample import MediaKind, MediaPart, Sample, TextPart
from avflow.datasets.sampling import frame_budget
from avflow.pathways.layout import LayoutError
from avflow.workers.models.base import ModelSpec, Prepared
from avflow.workers.models.prompting import (
    Label,
    Prompt,
    expand,
    layout_of,
    option_tokens,
    render_prompt,
)
from avflow.workers.models.video_salmonn2_config import SAMPLE_RATE, media_spec
from avflow.workers.models.video_salmonn2_positions import (
    BLOCK_S,
    TOKENS_PER_BLOCK,
    TOKENS_PER_SECOND,
    Block,
    PositionRule,
    frame_steps,
    is_sound,
    position_ids,
)

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."  # in the authors' code, always
OPENING, CLOSING = "<|vision_start|>", "<|vision_end|>"
PICTURE, SOUND = "<|video_pad|>", "<|audio_pad|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMaker:
    """What making a prompt takes: the checkpoint's tokenizer and processors, no weights.

    `positions` and `block_audio_padding` as in `ModelSpec`; `longest` prompt in tokens.
    """

    tokenizer: Any
    frames: Any  # Qwen2VLVideoProcessor
    mel: Any  # WhisperFeatureExtractor
    media_spec: MediaSpec
    system_prompt: str
    positions: PositionRule
    block_audio_padding: bool
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    """A sound as the encoder takes it: mel [C, bins, 3000]; of its 60 C tokens the first `n_real`
    hold sound, the others silence that was put after it."""

    mel: Tensor
    n_real: int
    notes: tuple[str, ...]


def prompt_maker(spec: ModelSpec, config: dict[str, Any], tokenizer: Any) -> PromptMaker:
    """`config` as in config.json. The processors are the authors' own choice, whatever files of
    processors lie beside the weights."""
    import transformers

    hf: Any = transformers
    return PromptMaker(
        tokenizer=tokenizer,
        frames=hf.Qwen2VLVideoProcessor(
            patch_size=config["vision_config"]["patch_size"], temporal_patch_size=2, merge_size=2
        ),
        mel=hf.WhisperFeatureExtractor(
            feature_size=config["audio_config"]["num_mel_bins"],
            sampling_rate=SAMPLE_RATE,
            hop_length=160,
            chunk_length=BLOCK_S,
        ),
        media_spec=media_spec(spec, config),
        system_prompt=DEFAULT_SYSTEM_PROMPT if spec.system_prompt is None else spec.system_prompt,
        positions=spec.positions,
        block_audio_padding=spec.block_audio_padding,
        longest=config["max_position_embeddings"],
    )


def prepare(maker: PromptMaker, sample: Sample, media: Sequence[DecodedMedia]) -> Prepared:
    """Tensors and layout of one sample, on the CPU. Raises LayoutError, MediaError."""
    medium = _only_medium(sample, media)
    tensors: dict[str, Tensor] = {}
    grid, seconds = None, 0.0
    if medium.kind == "video":
        tensors, grid, seconds = _watch(maker, sample, medium)
    heard = None
    if medium.waveform is not None:
        last_step = int(frame_steps(grid[0], seconds)[-1]) if grid else 0
        heard = hear(maker.mel, medium.waveform, last_step)
        tensors["input_features"] = heard.mel
    prompt = _rendered(maker, sample)
    opened: list[int] = maker.tokenizer(prompt.text[: _media_span(prompt)[0]])["input_ids"]
    block = Block(
        start=len(opened),
        grid=grid,
        seconds=seconds,
        n_audio=len(heard.mel) * TOKENS_PER_BLOCK if heard else 0,
    )
    sounds = is_sound(block)
    expanded = expand(prompt, ["".join(SOUND if s else PICTURE for s in sounds.tolist())])
    coded = maker.tokenizer(expanded.text, return_offsets_mapping=True)
    ids = torch.tensor(coded["input_ids"])
    _check_tokens(maker, sample, ids, block, sounds)
    offsets = [(int(start), int(stop)) for start, stop in coded["offset_mapping"]]
    markers = set(maker.tokenizer.convert_tokens_to_ids([OPENING, CLOSING]))
    layout = layout_of(
        expanded,
        offsets,
        {_media_number(sample): _labels(block, sounds, heard.n_real if heard else 0)},
        [token in markers for token in ids.tolist()],
        audio_with_padding=maker.block_audio_padding,
    )
    return Prepared(
        sample=sample,
        tensors={
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids[None]),
            "position_ids": position_ids(block, len(ids), maker.positions),
            **tensors,
        },
        layout=layout,
        option_tokens=option_tokens(maker.tokenizer, prompt),
        prompt=expanded.text,
        offsets=torch.tensor(offsets, dtype=torch.int64),
        notes=heard.notes if heard else (),
    )


def _only_medium(sample: Sample, media: Sequence[DecodedMedia]) -> DecodedMedia:
    kinds = [part.kind for part in sample.media]
    if sample.layout != "single_video" or kinds not in (["video"], ["audio"]):
        given = ", ".join(kinds) or "no media"
        raise MediaError(
            f"sample {sample.sample_id}: video-SALMONN 2+ takes one video (with or without its "
            f"sound) or one audio, this {sample.layout} sample has {given}; leave this task out "
            "for this model"
        )
    if [item.kind for item in media] != kinds:
        raise MediaError(
            f"sample {sample.sample_id}: decoded media are {[item.kind for item in media]}, parts "
            f"{kinds}"
        )
    (part,), (medium,) = sample.media, media
    if (medium.waveform is not None) != (part.with_audio or part.kind == "audio"):
        raise MediaError(
            f"sample {sample.sample_id}: {part.path} was decoded "
            f"{'with' if medium.waveform is not None else 'without'} its sound, unlike its part"
        )
    return medium


def _media_number(sample: Sample) -> int:
    return next(i for i, part in enumerate(sample.parts) if isinstance(part, MediaPart))


def _media_span(prompt: Prompt) -> tuple[int, int]:
    return prompt.spans[_media_number(prompt.sample)]


def _watch(
    maker: PromptMaker, sample: Sample, medium: DecodedMedia
) -> tuple[dict[str, Tensor], tuple[int, int, int], float]:
    """The frames as patches, their grid (t, h, w), and the seconds a frame pair lasts."""
    if medium.frames is None or not medium.seconds_per_frame:
        raise MediaError(f"sample {sample.sample_id}: its video was decoded to no frames")
    tensors = see(maker.frames, medium.frames, maker.media_spec)
    pairs, height, width = tensors["video_grid_thw"][0].tolist()
    return tensors, (pairs, height, width), 2 * medium.seconds_per_frame


def see(processor: Any, frames: NDArray[np.uint8], spec: MediaSpec) -> dict[str, Tensor]:
    """Frames [T, 3, H, W] as transformers' video processor has them: `pixel_values_videos`
    [patches, 1176] and `video_grid_thw` [1, 3]. An odd last frame is repeated."""
    # Its default is to change between versions; older ones have no such bound.
    known = "cap_pixels_per_frame" in type(processor).valid_kwargs.__annotations__
    most = int(frame_budget(len(frames), spec))
    batch = processor(
        videos=[frames],
        do_sample_frames=False,
        size={"shortest_edge": spec.frame_min_pixels, "longest_edge": most},
        return_tensors="pt",
        **({"cap_pixels_per_frame": False} if known else {}),
    )
    return {
        "pixel_values_videos": batch["pixel_values_videos"],
        "video_grid_thw": batch["video_grid_thw"],
    }


def hear(extractor: Any, wave: NDArray[np.float32], last_step: int = 0) -> _Heard:
    """A wave [n] at 16 kHz in blocks of 30 s, each normalised alone, silence to fill the last.

    `last_step` is the half second at which the last frame pair begins. Where the sound ends in a
    block before that, blocks of silence follow, and a note says so: the authors' code raises an
    error there and puts another sample in the place of this one.
    """
    rate = extractor.sampling_rate
    n_real = math.ceil(TOKENS_PER_SECOND * len(wave) / rate)
    padded = np.pad(wave, (0, max(0, rate - len(wave))))  # at least 1 s
    blocks = [padded[i : i + BLOCK_S * rate] for i in range(0, len(padded), BLOCK_S * rate)]
    n_more = max(0, math.ceil((last_step - len(blocks) * TOKENS_PER_BLOCK) / TOKENS_PER_BLOCK))
    blocks += [np.zeros(BLOCK_S * rate, np.float32)] * n_more
    mel = [extractor(b, sampling_rate=rate, return_tensors="pt")["input_features"] for b in blocks]
    note = (
        f"sound ends at {len(wave) / rate:.2f} s, long before the last frame: {n_more} more "
        f"block(s) of {BLOCK_S} s of silence put after it"
    )
    return _Heard(mel=torch.cat(mel), n_real=n_real, notes=(note,) if n_more else ())


def _rendered(maker: PromptMaker, sample: Sample) -> Prompt:
    """The authors' turns; a medium is followed by a line's end, as in all their records."""
    pads: dict[MediaKind, str] = {"video": PICTURE, "audio": SOUND}

    def render(texts: Sequence[str]) -> str:
        words = iter(texts)
        content = "".join(
            next(words) if isinstance(part, TextPart) else f"{OPENING}{pads[part.kind]}{CLOSING}\n"
            for part in sample.parts
        )
        turns = {"system": maker.system_prompt, "user": content}
        said = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns.items()]
        return "".join([*said, "<|im_start|>assistant\n"])

    return render_prompt(sample, render, pads, sorted(maker.tokenizer.get_added_vocab()))


def _check_tokens(
    maker: PromptMaker, sample: Sample, ids: Tensor, block: Block, sounds: Tensor
) -> None:
    if len(ids) > maker.longest:
        raise MediaError(
            f"sample {sample.sample_id}: {len(ids)} tokens, the model takes {maker.longest}; "
            "lower max_frames, fps or frame_tokens"
        )
    picture, sound = maker.tokenizer.convert_tokens_to_ids([PICTURE, SOUND])
    wanted = torch.where(sounds, sound, picture)
    inside = ids[block.start : block.start + len(sounds)]
    n_pads = int(((ids == picture) | (ids == sound)).sum())
    if not torch.equal(inside, wanted) or n_pads != len(wanted):
        raise LayoutError(
            f"sample {sample.sample_id}: the tokenizer does not give a token for each "
            f"{PICTURE} and {SOUND}, so the media can't be located"
        )


def _labels(block: Block, sounds: Tensor, n_real: int) -> list[Label]:
    """A label for each token of the block: a frame pair is a frame; what is heard between two of
    them is a chunk, and where there are none, each window of half a second."""
    labels: list[Label] = []
    seen = heard = chunks = 0
    for is_heard in sounds.tolist():
        if not is_heard:
            labels.append(("frame", seen // block.row_tokens))
            seen += 1
            continue
        if heard >= n_real:
            labels.append(("audio_padding", None))
        else:
            same = bool(labels) and labels[-1][0] == "audio_chunk" and block.grid is not None
            chunks += not same
            labels.append(("audio_chunk", chunks - 1))
        heard += 1
    return labels
