"""video-SALMONN 2+ from files: samples that it refuses, and clips through the engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from engine_ways import reference_edges, reference_inputs
from media_files import even, write_video
from salmonn import change_config, sample_of, spec_of, tiny_checkpoint

from avflow.datasets.media import DecodedMedia, MediaError, decode_sample
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaKind, MediaPart, Sample, TextPart
from avflow.datasets.sampling import spread_indices
from avflow.datasets.testbed.render import render_clip
from avflow.datasets.testbed.world import Scene
from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions, members
from avflow.pathways.pathway import Pathway
from avflow.workers.engine import reference
from avflow.workers.models import load
from avflow.workers.models.base import LoadedModel, embed
from avflow.workers.models.conformance import Case, conformance
from avflow.workers.protocol import CurveDone, CurveSpec, SampleDone, UnitSpec
from avflow.workers.run_unit import run_unit

SECONDS = 5
QUESTION = multiple_choice(
    "Which colour is shown?\n", ["red", "green", "blue"], closing="The best answer is:"
)
HEARD = sample_of(QUESTION[0].text, options=QUESTION[1:])
SEEN = sample_of(QUESTION[0].text, with_audio=False, options=QUESTION[1:])
ONLY_HEARD = sample_of(QUESTION[0].text, "audio", options=QUESTION[1:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "salmonn")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Callable[..., LoadedModel]:
    kept: dict[str, LoadedModel] = {}

    def build(**changes: Any) -> LoadedModel:
        key = repr(changes)
        if key not in kept:
            kept[key] = load(spec_of(checkpoint, **changes), "cpu")
        return kept[key]

    return build


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    classes = tuple(range(SECONDS))
    render_clip(Scene(colours=classes, sounds=classes, seed=0), root / "clip.mp4")
    return root


# -- samples ---------------------------------------------------------------------------------


def interleaved(*kinds: MediaKind) -> Sample:
    parts = tuple(
        MediaPart(kind=kind, path=f"{i}", role="candidate", index=i) for i, kind in enumerate(kinds)
    )
    return replace(
        HEARD, layout="interleaved", parts=(*parts, *HEARD.parts[1:]), correct_candidate=0
    )


@pytest.mark.parametrize(
    ("sample", "given"),
    [
        (interleaved("image", "image", "audio"), "interleaved sample has image, image, audio"),
        (interleaved("video"), "interleaved sample has video"),
        (replace(HEARD, parts=(*HEARD.parts[:1], *HEARD.parts)), "has video, video"),
        (sample_of("?", "image"), "single_video sample has image"),
        (replace(HEARD, parts=HEARD.parts[1:]), "has no media"),
    ],
)
def test_samples_of_other_media_are_refused_by_name(
    loaded: Callable[..., LoadedModel], sample: Sample, given: str
) -> None:
    with pytest.raises(MediaError, match=f"one video .* or one audio, this .*{given}"):
        loaded().prepare(sample, ())


def test_media_decoded_otherwise_than_the_sample_says(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    silent = decode_sample(media, SEEN, loaded().media_spec)
    with pytest.raises(MediaError, match=r"clip\.mp4 was decoded without its sound"):
        loaded().prepare(HEARD, silent)
    with pytest.raises(MediaError, match="decoded media are"):
        loaded().prepare(HEARD, ())


def test_a_control_token_in_a_question_is_refused(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    text = TextPart(role="question", text="What is <|audio_pad|>?")
    sample = replace(SEEN, parts=(SEEN.parts[0], text))
    decoded = decode_sample(media, sample, loaded().media_spec)
    with pytest.raises(ValueError, match="reads as a control token"):
        loaded().prepare(sample, decoded)


def test_a_prompt_that_is_too_long_is_refused(tmp_path: Path, media: Path) -> None:
    change_config(tiny_checkpoint(tmp_path), max_position_embeddings=100)
    model = load(spec_of(tmp_path), "cpu")
    decoded = decode_sample(media, HEARD, model.media_spec)
    with pytest.raises(MediaError, match="the model takes 100; lower max_frames"):
        model.prepare(HEARD, decoded)


# -- from media files to numbers -------------------------------------------------------------


def write_wide_video(path: Path, *, n_frames: int, rate: int) -> None:
    """640 x 360; frame i is grey of level 2 i."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 640, 360, "yuv420p"
        video.options = {"crf": "4", "preset": "ultrafast"}
        for i in range(n_frames):
            frame = np.full((360, 640, 3), 2 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))


def test_frames_are_read_the_authors_way(
    loaded: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Forty frames of four seconds, from the first to the last, within the shared budget."""
    write_wide_video(tmp_path / "clip.mp4", n_frames=100, rate=25)
    spec = loaded(fps=10.0, max_frames=768).media_spec
    (decoded,) = decode_sample(tmp_path, SEEN, spec)
    assert decoded.frames is not None
    assert decoded.frames.shape == (40, 3, 360, 640)  # 1,117,200 pixels are each frame's share
    assert decoded.seconds_per_frame == pytest.approx(0.1)
    assert decoded.frame_times[0] == 0
    assert decoded.frame_times[-1] == pytest.approx(4 - 1 / 25)
    shown = decoded.frames.mean(axis=(1, 2, 3)) / 2
    taken = spread_indices(100, 4.0, spec)
    assert (np.abs(shown - taken + 0.25) < 0.5).all()  # the codec darkens a little
    (small,) = decode_sample(tmp_path, SEEN, loaded(fps=10.0, max_frames=40).media_spec)
    assert small.frames is not None
    assert small.frames.shape == (40, 3, 168, 308)  # as smart_resize has it for 61,250 pixels
    (own,) = decode_sample(tmp_path, SEEN, loaded(frame_tokens=4).media_spec)
    assert own.frames is not None
    assert own.frames.shape == (16, 3, 28, 56)


def test_two_channels_are_mixed_as_ffmpeg_does(
    loaded: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    write_video(tmp_path / "clip.mp4", even(2, 5), sound_s=2)
    spec = loaded().media_spec
    (mixed,), (mean,) = (
        decode_sample(tmp_path, HEARD, s) for s in (spec, replace(spec, mono="mean"))
    )
    assert mixed.waveform is not None
    assert mean.waveform is not None
    np.testing.assert_allclose(mixed.waveform, mean.waveform * 2**0.5, atol=1e-4)


def test_a_clip_is_laid_out_as_the_authors_weave_it(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    prepared = loaded().prepare(HEARD, decode_sample(media, HEARD, loaded().media_spec))
    layout = prepared.layout
    assert len(members(layout, "video")) == 8  # 16 frames at least
    assert len(group_positions(layout, "audio")) == 60
    assert len(group_positions(layout, "audio_padding")) == 50
    assert prepared.prompt.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|>"
    )
    assert "<|audio_pad|><|vision_end|>\nWhich colour is shown?\n" in prepared.prompt
    assert prepared.prompt.endswith("The best answer is:<|im_end|>\n<|im_start|>assistant\n")
    names = [s.name for s in layout.segments]
    assert names[:4] == ["system", "template", "frame:0", "audio_chunk:0"]
    assert len(set(prepared.option_tokens)) == 3
    alone = loaded().prepare(ONLY_HEARD, decode_sample(media, ONLY_HEARD, loaded().media_spec))
    assert len(members(alone.layout, "audio")) == 10 + 1  # half seconds, and the silence


def test_features_depend_on_the_media_alone(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    from avflow.workers.encoders import media_digest

    model, decoded = loaded(), decode_sample(media, HEARD, loaded().media_spec)
    other = replace(HEARD, parts=(HEARD.parts[0], replace(QUESTION[0], text="Who?\n")))
    one, two = model.prepare(HEARD, decoded), model.prepare(other, decoded)
    assert media_digest(one) == media_digest(two)
    assert one.tensors["position_ids"].shape != two.tensors["position_ids"].shape


def curves(model: LoadedModel, *names: str) -> tuple[CurveSpec, ...]:
    own = Pathway(
        name="padding_to_question",
        layout="single_video",
        sources=("audio_padding",),
        targets=("question",),
    )
    found = [p for name in names for p in catalogue.find(name) if p.layout == "single_video"]
    return tuple(
        CurveSpec(
            pathway=pathway,
            window=2,
            center_layers=tuple(range(model.info.n_layers)),
            correct_only=False,
        )
        for pathway in (*found, own)
    )


def unit(sample: Sample, root: Path, some: tuple[CurveSpec, ...]) -> UnitSpec:
    return UnitSpec(
        unit_id="u1",
        model="tiny",
        data_root=str(root),
        sample=sample,
        curves=some,
        wanted=frozenset(c.key for c in some),
        byte_budget=2**23,
        cost=1,
    )


@pytest.mark.parametrize("rule", ["generate", "train"])
@pytest.mark.parametrize("padding", [True, False])
def test_a_clip_through_the_engine_gives_the_references_numbers(
    loaded: Callable[..., LoadedModel], media: Path, rule: str, padding: bool
) -> None:
    torch.set_num_threads(1)
    model = loaded(positions=rule, block_audio_padding=padding)
    some = curves(model, "cross_frame", "cross_audio", "audio_video_mutual", "audio_to_question",
                  "video_to_last", "question_to_last")  # fmt: skip
    decoded = decode_sample(media, HEARD, model.media_spec)
    events = list(run_unit(model, unit(HEARD, media, some), decoded, decode_s=0))
    done = {event.curve: event for event in events if isinstance(event, CurveDone)}
    assert set(done) == {c.key for c in some}
    prepared = model.prepare(HEARD, decoded)
    inputs = reference_inputs(embed(model, prepared))
    for c in some:
        edges = reference_edges(prepared.layout, c.pathway)
        for center in c.center_layers:
            expected = reference.knockout_probabilities(model.hf_model, inputs, edges, center, 2)
            options = expected[list(prepared.option_tokens)].double().numpy()
            np.testing.assert_allclose(done[c.key].p_options[center], options, atol=1e-5)


def test_the_suite_that_every_adapter_passes(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    model = loaded(dtype="bfloat16", positions="train")
    cases = [
        Case(sample=sample, media=decode_sample(media, sample, model.media_spec))
        for sample in (HEARD, SEEN, ONLY_HEARD)
    ]
    cases.append(Case(sample=interleaved("image", "audio"), media=()))
    checks = list(conformance(model, cases))
    assert [c for c in checks if c.result == "failed"] == []
    assert sum(c.result == "refused" for c in checks) == 1


def test_blocking_padding_or_not_changes_the_result(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    found = []
    for padding in (True, False):
        model = loaded(block_audio_padding=padding)
        some = curves(model, "audio_to_question")
        decoded = decode_sample(media, HEARD, model.media_spec)
        events = list(run_unit(model, unit(HEARD, media, some), decoded, decode_s=0))
        done = {event.curve: event for event in events if isinstance(event, CurveDone)}
        found.append(done[some[0].key])
    assert (found[0].n_blocked_edges > found[1].n_blocked_edges).all()
    assert np.abs(found[0].p_options - found[1].p_options).max() > 1e-6


def test_silence_put_after_an_early_end_reaches_the_samples_row(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    rng = np.random.default_rng(0)
    medium = DecodedMedia(
        kind="video",
        frames=rng.integers(0, 256, (32, 3, 56, 56), np.uint8),
        waveform=rng.normal(0, 0.1, 20 * 16_000).astype(np.float32),
        frame_times=tuple(2.0 * i for i in range(32)),
        seconds_per_frame=2.0,
        duration=64.0,
        notes=("decoded",),
    )
    model = loaded()
    events = list(run_unit(model, unit(HEARD, media, curves(model)), [medium], decode_s=0))
    (sample,) = (event for event in events if isinstance(event, SampleDone))
    assert sample.notes[0] == "clip.mp4: decoded"
    assert sample.notes[1].startswith("sound ends at 20.00 s, long before the last frame")
    assert len(sample.notes) == 2
