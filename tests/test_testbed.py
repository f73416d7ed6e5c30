"""The testbed's world and data set: deterministic, balanced, without short cuts, in real files."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.datasets.testbed import TASKS, load
from avflow.datasets.testbed.looks import SIDE_PX, draw_frames, play_second
from avflow.datasets.testbed.questions import ask
from avflow.datasets.testbed.render import render_clip
from avflow.datasets.testbed.world import CLIP_SECONDS, COLOURS, SOUNDS, sample_scene
from avflow.workers import models
from avflow.workers.models.base import LoadedModel, ModelSpec, embed

CLIP_TASKS = [task.name for task in TASKS if task.layout == "single_video"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("testbed")


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    return load(root, seed=5, samples_per_task=12)


def option_words(sample: Sample) -> list[str]:
    return [
        part.text.removeprefix(". ").strip()
        for part in sample.parts
        if isinstance(part, TextPart) and part.role == "option_text"
    ]


def test_every_task_has_its_samples_with_distinct_ids(samples: list[Sample]) -> None:
    assert Counter(s.task for s in samples) == {task.name: 12 for task in TASKS}
    assert len({s.sample_id for s in samples}) == len(samples)
    assert all(s.n_options == 4 and s.dataset == "testbed" for s in samples)


def test_correct_letters_are_balanced_in_every_task(samples: list[Sample]) -> None:
    for task in TASKS:
        answers = Counter(s.answer for s in samples if s.task == task.name)
        assert answers == {0: 3, 1: 3, 2: 3, 3: 3}


def test_the_same_arguments_give_the_same_samples_and_files(
    samples: list[Sample], root: Path, tmp_path: Path
) -> None:
    again = load(tmp_path, seed=5, samples_per_task=12)
    assert again == samples
    for path in {part.path for sample in samples for part in sample.media}:
        assert (tmp_path / path).read_bytes() == (root / path).read_bytes(), path


def test_more_samples_only_append_and_fewer_tasks_change_nothing(
    samples: list[Sample], root: Path
) -> None:
    more = load(root, seed=5, samples_per_task=16, tasks=("sight", "match_sound"))
    kept = [s for s in more if int(s.sample_id.rsplit("-", 1)[1]) < 12]
    assert kept == [s for s in samples if s.task in ("sight", "match_sound")]


def test_rendered_files_are_kept(samples: list[Sample], root: Path) -> None:
    clip = root / samples[0].media[0].path
    before = clip.stat().st_mtime_ns
    load(root, seed=5, samples_per_task=12)
    assert clip.stat().st_mtime_ns == before
    assert not list(root.rglob("*.part"))


def test_an_unknown_task_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"smell.*known.*sight"):
        load(tmp_path, seed=1, samples_per_task=1, tasks=("smell",))


def test_a_clip_is_a_real_video_with_a_sound_track_of_the_same_length(
    samples: list[Sample], root: Path
) -> None:
    with av.open(str(root / samples[0].media[0].path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == "h264"
        assert audio.codec_context.name == "aac"
        assert (video.width, video.height) == (SIDE_PX, SIDE_PX)
        assert float(video.duration * video.time_base) == CLIP_SECONDS
        assert float(audio.duration * audio.time_base) == CLIP_SECONDS


def test_seconds_of_sound_do_not_overlap_after_coding(tmp_path: Path) -> None:
    """The encoder's delay is compensated: sound is faint where two seconds meet."""
    scene = sample_scene(Random(3))
    render_clip(scene, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    for second in range(1, CLIP_SECONDS):
        border = slice(16_000 * second - 160, 16_000 * second + 160)
        assert np.abs(wave[border]).max() < 0.2


def test_a_failed_rendering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("avflow.datasets.testbed.render._encode", fail)
    with pytest.raises(OSError, match="disk full"):
        render_clip(sample_scene(Random(0)), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 10_000), st.sampled_from(CLIP_TASKS), st.integers(0, 3))
def test_the_right_option_is_the_only_right_one(seed: int, task: str, answer: int) -> None:
    scene = sample_scene(Random(seed))
    question = ask(task, scene, Random(seed + 1), answer=answer)
    assert len(set(question.options)) == 4
    assert question.anchor not in question.option_words
    after = dict(zip(scene.colours, scene.colours[1:], strict=False))
    truth = {
        "sight": [int(c in scene.colours) for c in question.options],
        "sound": [int(c in scene.sounds) for c in question.options],
    }
    if task in truth:
        expected = [int(i == answer) for i in range(4)]
        assert truth[task] == expected
    elif task == "colour_after_colour":
        assert question.options[answer] == after[COLOURS.index(question.anchor)]
    elif task == "colour_when_sound":
        at = scene.sounds.index(SOUNDS.index(question.anchor))
        assert question.options[answer] == scene.colours[at]
    elif task == "sound_when_colour":
        at = scene.colours.index(COLOURS.index(question.anchor))
        assert question.options[answer] == scene.sounds[at]
    else:
        at = scene.sounds.index(SOUNDS.index(question.anchor)) + 1
        shown = scene.colours if task == "colour_after_sound" else scene.sounds
        assert question.options[answer] == shown[at]


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_seeing_without_hearing_leaves_four_candidates(seed: int, answer: int) -> None:
    """`colour_after_sound` never offers the first colour, the one that can't be the answer."""
    scene = sample_scene(Random(seed))
    question = ask("colour_after_sound", scene, Random(seed), answer=answer)
    assert set(question.options) == set(scene.colours[1:])


def test_a_matching_sample_has_one_match_and_fixed_roles(samples: list[Sample]) -> None:
    for sample in samples:
        if sample.layout != "interleaved":
            continue
        names = [Path(part.path).stem.rsplit("-", 1)[0] for part in sample.media]
        *candidates, reference = names
        pairs = dict(zip(COLOURS, SOUNDS, strict=True)) | dict(zip(SOUNDS, COLOURS, strict=True))
        assert candidates.index(pairs[reference]) == sample.answer == sample.correct_candidate
        assert [p.role for p in sample.media] == ["candidate"] * 4 + ["reference"]
        assert len({p.kind for p in sample.media[:4]}) == 1


def test_all_tasks_about_clips_share_the_clips(samples: list[Sample]) -> None:
    groups = {s.media_group: s.media[0] for s in samples if s.layout == "single_video"}
    assert len(groups) == 12
    assert all(isinstance(p, MediaPart) and p.with_audio for p in groups.values())
    assert option_words(samples[0])[samples[0].answer] in COLOURS


def test_classes_look_and_sound_different() -> None:
    """Mean colours and spectra of two classes are further apart than two of one class."""

    def spectrum(name: str, seed: int) -> np.ndarray:
        wave = play_second(name, np.random.default_rng(seed))
        power = np.abs(np.fft.rfft(wave)) ** 2
        bands = np.array([band.sum() for band in np.array_split(power, 200)])
        return np.log10(bands + 1e-3)

    def colour(name: str, seed: int) -> np.ndarray:
        frame = draw_frames(name, 1, np.random.default_rng(seed))[0]
        middle = frame[20:36, 20:36].astype(float)
        return np.median(middle, axis=(0, 1))

    for names, features in ((SOUNDS, spectrum), (COLOURS, colour)):
        prototypes = {name: features(name, 0) for name in names}
        for name in names:
            distances = {o: np.abs(features(name, 1) - p).mean() for o, p in prototypes.items()}
            assert min(distances, key=lambda o: distances[o]) == name


@pytest.fixture(scope="module")
def shipped() -> LoadedModel:
    spec = ModelSpec(name="testbed", family="qwen2_5_omni", path="testbed", dtype="float32")
    return models.load(spec, torch.device("cpu"))


@torch.no_grad()
def test_the_shipped_model_answers_held_out_scenes(
    shipped: LoadedModel, samples: list[Sample], root: Path
) -> None:
    """Spot check of the model card's table: at most one of a task's 12 samples is wrong."""
    for task in TASKS:
        hits = 0
        for sample in [s for s in samples if s.task == task.name]:
            prepared = shipped.prepare(sample, decode_sample(root, sample, shipped.media_spec))
            is_clip = sample.layout == "single_video"
            logits = shipped.hf_model(**prepared.tensors, use_audio_in_video=is_clip).logits
            hits += int(logits[0, -1].argmax()) == prepared.option_tokens[sample.answer]
        assert hits >= 11, f"{task.name}: {hits} of 12"


@torch.no_grad()
def test_no_second_leaks_into_another_inside_the_encoders(
    shipped: LoadedModel, samples: list[Sample], root: Path
) -> None:
    """What passes between seconds must pass in the decoder, where knockouts can see it."""
    sample = samples[0]
    prepared = shipped.prepare(sample, decode_sample(root, sample, shipped.media_spec))
    before = embed(shipped, prepared).inputs_embeds[0]
    tensors = {name: tensor.clone() for name, tensor in prepared.tensors.items()}
    tensors["pixel_values_videos"][32:48] += 1.0  # the third second: 16 patches each
    tensors["input_features"][0, :, 40:60] += 1.0  # 20 mel frames each
    after = embed(shipped, replace(prepared, tensors=tensors)).inputs_embeds[0]
    changed = torch.nonzero((before != after).any(-1)).flatten().tolist()
    third = [s for s in prepared.layout.of("frame", "audio_chunk") if s.index == 2]
    assert changed == [p for segment in third for p in range(segment.start, segment.stop)]
    assert len(changed) == 9


def test_the_checkpoint_is_small_and_has_its_card() -> None:
    folder = Path(models.__file__).parent / "testbed"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert "## Knockouts" in (folder / "README.md").read_text()
