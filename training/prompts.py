"""A sample's model inputs by the real path, and where its token groups lie."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5OmniProcessor

from avflow.datasets.media import DecodedMedia, decode_sample
from avflow.datasets.sample import MediaPart, Sample, TextPart
from training.media import MEDIA_SPEC, PIXELS
from training.model import FPS, TOKENS_PER_SECOND

_SIZE = {"shortest_edge": PIXELS, "longest_edge": PIXELS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One sample's processor output and its token groups.

    A group is a tuple of units (a frame, a second of sound, a candidate), a unit a list of
    positions: `cross_…` pathways block between units.
    """

    sample: Sample
    tensors: dict[str, Tensor]
    groups: dict[str, tuple[list[int], ...]]

    @property
    def is_clip(self) -> bool:
        """Whether the media are one clip with its sound interleaved."""
        return self.sample.layout == "single_video"


def prepare(processor: Qwen2_5OmniProcessor, root: Path, sample: Sample) -> Prompt:
    """Decode a sample's media and run the processor on the chat it makes."""
    media = decode_sample(root, sample, MEDIA_SPEC)
    content = [
        {"type": part.kind} if isinstance(part, MediaPart) else {"type": "text", "text": part.text}
        for part in sample.parts
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    videos = [m.frames for m in media if m.kind == "video"]
    output = processor(
        text=[text],
        images=[_picture(m) for m in media if m.kind == "image"] or None,
        videos=[torch.from_numpy(frames) for frames in videos] or None,
        audio=[m.waveform for m in media if m.waveform is not None] or None,
        load_audio_from_video=bool(videos),
        audio_from_video_indices=[0] if videos else None,
        images_kwargs={"size": _SIZE},
        videos_kwargs={
            "fps": FPS,
            "size": _SIZE,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
        },
        position_id_per_seconds=TOKENS_PER_SECOND,
        seconds_per_chunk=1.0,
        return_tensors="pt",
    )
    return Prompt(sample=sample, tensors=dict(output), groups=_groups(processor, sample, output))


def _picture(media: DecodedMedia) -> Tensor:
    assert media.frames is not None
    return torch.from_numpy(media.frames[0])


def _groups(
    processor: Qwen2_5OmniProcessor, sample: Sample, output: dict[str, Tensor]
) -> dict[str, tuple[list[int], ...]]:
    """Find the groups by the kinds of tokens and, from the end, by the lengths of the texts."""
    ids = output["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    kinds = {
        tokenizer.video_token_id: "video",
        tokenizer.image_token_id: "image",
        tokenizer.audio_token_id: "audio",
    }
    runs = [
        (kind, [position for position, _ in run])
        for kind, run in groupby(enumerate(ids), key=lambda item: kinds.get(item[1]))
        if kind is not None
    ]
    end = len(ids) - len(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"))
    letters: dict[int, list[int]] = {}
    options_start = end
    for part in reversed(sample.parts):
        if isinstance(part, MediaPart) or part.role == "question":
            break
        options_start -= len(tokenizer.encode(part.text))
        if part.role == "option_letter":
            letters[part.index or 0] = [options_start]
    groups = {
        "last": ([len(ids) - 1],),
        "true_option": (letters.pop(sample.answer),),
        "false_options": tuple(letters.values()),
    }
    if sample.layout == "single_video":
        media_end = runs[-1][1][-1] + 1
        return groups | {
            "video": tuple(at for kind, at in runs if kind == "video"),
            "audio": tuple(at for kind, at in runs if kind == "audio"),
            "question": (list(range(media_end, len(ids) - 1)),),
            "non_option_question": (list(range(media_end + 2, options_start)),),
        }
    candidates = [at for _, at in runs[:-1]]
    reference = runs[-1][1]
    question = next(p for p in sample.parts if isinstance(p, TextPart) and p.role == "question")
    before = reference[0] - 1  # the token that opens the reference
    start = before - len(tokenizer.encode(question.text))
    right = sample.correct_candidate or 0
    return groups | {
        "candidates": tuple(candidates),
        "correct_candidate": (candidates[right],),
        "incorrect_candidates": tuple(c for i, c in enumerate(candidates) if i != right),
        "reference": (reference,),
        "question": (list(range(start, before)),),
    }


def flat(units: Iterable[list[int]]) -> list[int]:
    """All positions of a group."""
    return [position for unit in units for position in unit]
