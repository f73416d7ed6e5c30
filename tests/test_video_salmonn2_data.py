"""video-SALMONN 2+'s data path beside the authors' own: frames, pixels, mel, prompts, positions."""

import hashlib
import json
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from salmonn import CONFIG, RECORDED, SPECIAL, sample_of, spec_of, word_tokenizer

from avflow.datasets.media import DecodedMedia
from avflow.datasets.sampling import (
    fit_antialiased,
    frame_budget,
    spread_indices,
    spread_times,
)
from avflow.pathways.groups import group_positions, members
from avflow.workers.models.base import Prepared
from avflow.workers.models.video_salmonn2_positions import (
    Block,
    is_sound,
    position_ids,
    sounds_after,
)
from avflow.workers.models.video_salmonn2_prompt import PromptMaker, prepare, prompt_maker, see

LAYOUTS: list[dict[str, Any]] = json.loads((RECORDED / "layout_cases.json").read_text())
DATA: dict[str, dict[str, Any]] = json.loads((RECORDED / "data_cases.json").read_text())
TENSORS = load_file(RECORDED / "data_cases.safetensors")
WHOLE = [name for name, case in DATA.items() if "error" not in case]
REAL_IDS = dict(
    zip(SPECIAL, (151644, 151645, 151652, 151653, 151656, 151665), strict=True)
) | {"\n": 198}  # fmt: skip
RATE = 16_000


def maker(**changes: Any) -> PromptMaker:
    """The authors' settings on their data, with their made-up words of the recording."""
    text = "system You are a helpful assistant. user What happens here ? assistant"
    words = {word: 1000 + sum(map(ord, word)) for word in text.split()}
    config = CONFIG | {
        "max_position_embeddings": 128_000,
        "audio_config": CONFIG["audio_config"] | {"num_mel_bins": 128},
    }
    settings = {"fps": 10.0, "max_frames": 768, "positions": "train"} | changes
    tokenizer = word_tokenizer({"<unk>": 0} | REAL_IDS | words)
    return prompt_maker(spec_of("unused", **settings), config, tokenizer)


def pictures(indices: list[int], height: int, width: int) -> NDArray[np.uint8]:
    c, y, x = np.ogrid[:3, :height, :width]
    return np.stack([(3 * x + 5 * y + 7 * f + 11 * c) % 256 for f in indices]).astype(np.uint8)


def wave(n: int) -> NDArray[np.float32]:
    t = np.arange(n) / RATE
    heard = 0.4 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * (300 + 40 * t) * t)
    return heard.astype(np.float32)


def prepared_case(name: str, by: PromptMaker) -> Prepared:
    about, use_audio = DATA[name]["media"], DATA[name].get("use_audio", True)
    duration = about["frames"] / about["fps"]
    indices = spread_indices(about["frames"], duration, by.media_spec).tolist()
    heard = wave(about["samples"]) if use_audio and about["samples"] else None
    medium = DecodedMedia(
        kind="video",
        frames=pictures(indices, *about["hw"]),
        waveform=heard,
        frame_times=(),
        seconds_per_frame=duration / len(indices),
        duration=duration,
        notes=(),
    )
    return prepare(by, sample_of(with_audio=heard is not None), [medium])


@pytest.mark.parametrize("name", WHOLE)
def test_frames_pixels_mel_prompt_and_positions_are_the_recorded(name: str) -> None:
    case, by = DATA[name], maker()
    about = case["media"]
    duration = about["frames"] / about["fps"]
    taken = spread_indices(about["frames"], duration, by.media_spec).tolist()
    assert taken == case["frame_indices"]
    prepared = prepared_case(name, by)
    tensors = prepared.tensors
    ids = tensors["input_ids"][0].tolist()
    assert [[token, len(list(run))] for token, run in groupby(ids)] == case["ids_rle"]
    assert len(ids) == case["seq_len"]
    assert tensors["video_grid_thw"].tolist() == [case["grid"]]
    assert list(tensors["pixel_values_videos"].shape) == case["pixel_shape"]
    pixels = tensors["pixel_values_videos"][::97, ::41]
    assert torch.equal(pixels, TENSORS[f"{name}.pixel_values[::97, ::41]"])
    assert torch.equal(tensors["position_ids"][:, 0], TENSORS[f"{name}.position_ids"].long())
    if case["audio_feature_shape"] is None:
        assert "input_features" not in tensors
        return
    assert list(tensors["input_features"].shape) == case["audio_feature_shape"]
    mel = tensors["input_features"][:, ::8, ::100]
    assert torch.equal(mel, TENSORS[f"{name}.audio_feature[:, ::8, ::100]"])


@pytest.mark.parametrize("name", [n for n in WHOLE if DATA[n]["audio_feature_shape"]])
def test_the_silence_after_the_sound_is_padding(name: str) -> None:
    layout = prepared_case(name, maker()).layout
    real = -(-2 * DATA[name]["media"]["samples"] // RATE)
    assert len(group_positions(layout, "audio_padding")) == 60 - real
    assert len(group_positions(layout, "audio")) == 60
    apart = prepared_case(name, maker(block_audio_padding=False)).layout
    assert len(group_positions(apart, "audio")) == real
    heard = group_positions(layout, "audio")
    assert group_positions(apart, "audio").tolist() == heard[:real].tolist()
    assert group_positions(apart, "audio_padding").tolist() == heard[real:].tolist()
    assert len(members(apart, "video")) == DATA[name]["grid"][0]
    question = group_positions(layout, "question")
    assert question[0] == heard[-1] + 1  # what closes the media comes next


def test_sound_that_ends_early_is_padded_and_recorded() -> None:
    """The authors' code raises here, and puts another sample in the place of this one."""
    case = DATA["audio_ends_early"]
    assert "shape mismatch" in case["error"]
    prepared = prepared_case("audio_ends_early", maker())
    assert prepared.tensors["input_features"].shape == (3, 128, 3000)  # 59 s of sound, 61 s seen
    (note,) = prepared.notes
    assert note.startswith("sound ends at 59.00 s, long before the last frame: 1 more block(s)")
    layout = prepared.layout
    assert len(group_positions(layout, "audio")) == 180
    assert len(group_positions(layout, "audio_padding")) == 180 - 118
    padding = [s for s in layout.segments if s.kind == "audio_padding"]
    assert len(padding) > 1  # some of it lies between frames
    assert prepared_case("short", maker()).notes == ()


def test_trained_text_goes_on_from_the_clock_however_wide_the_picture_is() -> None:
    """No recording has a picture wider than its sound is long; the rule is the authors' all the
    same: with sound the last time, without it the largest of all axes."""
    for n_audio, after in ((60, 4 + 60), (0, 4 + 100)):
        block = Block(start=4, grid=(1, 2, 200), seconds=1.0, n_audio=n_audio)
        found = position_ids(block, 4 + 100 + n_audio + 2, "train")[:, 0]
        assert int(found[2].max()) >= 4 + 99
        assert found[:, -2:].tolist() == [[after, after + 1]] * 3


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: f"{c['grid']}x{c['seconds_per_grid']}")
def test_groups_and_positions_under_both_rules_are_the_recorded(case: dict[str, Any]) -> None:
    pairs, height, width = case["grid"]
    seconds, n_audio = case["seconds_per_grid"], case["audio_tokens"]
    assert sounds_after(pairs, seconds, n_audio) == case["groups"]
    block = Block(start=4, grid=(pairs, height, width), seconds=seconds, n_audio=n_audio)
    n_tokens = 4 + len(is_sound(block)) + 4
    for rule in ("generate", "train"):
        found = position_ids(block, n_tokens, rule)[:, 0]
        assert int(found.max()) + 1 - n_tokens == case[f"{rule}_delta"]
        if rule in case:
            assert found.tolist() == case[rule]
            ids = torch.tensor(case["input_ids"])
            assert torch.equal(ids[4:-4] == 151665, is_sound(block))
        else:
            assert n_tokens == case["seq_len"]
            digest = hashlib.sha256(found.contiguous().numpy().astype("<i8").tobytes())
            assert digest.hexdigest() == case[f"{rule}_sha256"]


@given(
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0.02, 8),
    st.integers(0, 3),
    st.integers(1, 20),
)
def test_every_token_has_its_place(
    pairs: int, rows: int, columns: int, seconds: float, spare: int, start: int
) -> None:
    n_blocks = int((pairs - 1) * seconds * 2) // 60 + 1 + spare
    block = Block(
        start=start, grid=(pairs, 2 * rows, 2 * columns), seconds=seconds, n_audio=60 * n_blocks
    )
    sounds = is_sound(block)
    assert int(sounds.sum()) == block.n_audio
    assert int((~sounds).sum()) == pairs * rows * columns
    assert not sounds[0]
    n_tokens = start + len(sounds) + 5
    text = torch.arange(start)
    for rule in ("generate", "train"):
        found = position_ids(block, n_tokens, rule)[:, 0]
        assert found.shape == (3, n_tokens)
        assert torch.equal(found[:, :start], text.repeat(3, 1))
        assert int(found[:, start:].min()) == start
        after = found[:, -5:]
        assert torch.equal(after, after[:1] + torch.zeros(3, 1, dtype=torch.int64))
        assert (after.diff() == 1).all()
        assert int(after[0, 0]) > int(found[0, :-5].max())
    trained = position_ids(block, n_tokens, "train")[:, 0, start : start + len(sounds)]
    assert torch.equal(trained[0, sounds], start + torch.arange(block.n_audio))
    # A frame pair never comes before the sound that is heard until then.
    before = torch.cummax(torch.where(sounds, trained[0], start), dim=0).values
    assert (trained[0, ~sounds] >= before[~sounds]).all()


def test_a_sound_that_ends_before_the_last_frame_can_not_be_woven() -> None:
    with pytest.raises(ValueError, match="60 audio tokens end before the last frame at 62"):
        sounds_after(32, 1.0, 60)
    assert sum(sounds_after(31, 1.0, 60)) == 60


@given(st.integers(1, 4000), st.sampled_from([1.0, 12.5, 24.0, 25.0, 30.0, 60.0]))
def test_frames_run_from_the_first_to_the_last(n_source: int, rate: float) -> None:
    spec = maker().media_spec
    duration = n_source / rate
    indices = spread_indices(n_source, duration, spec)
    assert indices[0] == 0
    assert (np.diff(indices) > 0).all()
    assert len(indices) <= min(n_source, spec.max_frames)
    if len(indices) > 1:
        assert indices[-1] == n_source - 1
    times, spacing = spread_times(duration, n_source, spec)
    assert len(times) == len(indices)
    assert spacing * len(times) == pytest.approx(duration)
    assert times[-1] < duration


def test_a_short_videos_frames_have_the_pixels_that_fewer_frames_leave() -> None:
    """280 x 504 pixels are more than 61,250, and less than a sixteenth of what all may have."""
    by = maker()
    tensors = see(by.frames, pictures(list(range(16)), 280, 504), by.media_spec)
    assert tensors["video_grid_thw"].tolist() == [[8, 20, 36]]


def test_what_is_heard_between_two_frame_pairs_is_one_chunk() -> None:
    medium = DecodedMedia(
        kind="video",
        frames=pictures(list(range(8)), 56, 56),
        waveform=wave(8 * RATE),
        frame_times=(),
        seconds_per_frame=1.0,
        duration=8.0,
        notes=(),
    )
    layout = prepare(maker(), sample_of(), [medium]).layout
    media = ("frame", "audio_chunk", "audio_padding")
    assert [(s.name, s.stop - s.start) for s in layout.segments if s.kind in media] == [
        *(part for i in range(4) for part in ((f"frame:{i}", 4), (f"audio_chunk:{i}", 4))),
        ("audio_padding", 60 - 16),
    ]


@pytest.mark.parametrize("n_frames", [16, 40, 767, 768])
@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (360, 640), (90, 120), (1000, 90)])
def test_a_frame_made_smaller_is_left_alone_by_the_processor(
    n_frames: int, size: tuple[int, int]
) -> None:
    """So that it is resized once, as the authors do."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    spec = maker().media_spec
    most = frame_budget(n_frames, spec)
    assert most == pytest.approx(61_250 if n_frames == 768 else 0.95 * 768 / n_frames * 61_250)

    def wanted(height: int, width: int, cap: float) -> tuple[int, int]:
        found: tuple[int, int] = smart_resize(height, width, 28, spec.frame_min_pixels, cap)
        return found

    read = fit_antialiased(*size, most, spec.patch_multiple)
    assert read == size or read[0] * read[1] < size[0] * size[1]
    assert wanted(*read, int(most)) == wanted(*size, most)
    assert read in (size, wanted(*size, most))
