"""The paper's input settings are the defaults, hold for real media, and are recorded with a run."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tiny_models import spec_of

from avflow.datasets.media import decode_sample
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, Sample
from avflow.orchestrator.config import ModelConfig
from avflow.orchestrator.identity import identity_fields
from avflow.orchestrator.known_models import PAPER_TOKENS, PUBLISHED
from avflow.orchestrator.memory import Need
from avflow.workers.models import load, longest_prompt_of
from avflow.workers.models.base import ModelSpec
from avflow.workers.models.qwen2_5_omni import DEFAULT_SYSTEM_PROMPT
from avflow.workers.models.room import needed_on_each
from avflow.workers.models.tiny import build_tiny_checkpoint

PAPER = {"fps": 2.0, "max_frames": 128, "frame_tokens": 144, "image_tokens": 576}
QUESTION = multiple_choice("Which?\n", ["x", "y"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With room for a long prompt."""
    folder = build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=2)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["max_position_embeddings"] = 32768
    file.write_text(json.dumps(config))
    return load(spec_of(folder), "cpu")


def sample_of(*media: MediaPart) -> Sample:
    clip = all(part.role == "clip" for part in media)
    return Sample(
        sample_id="s", dataset="d", task="t", category="c",
        layout="single_video" if clip else "interleaved", parts=(*media, *QUESTION), answer=0,
        media_group="g",
    )  # fmt: skip


def write_video(path: Path, *, seconds: int, width: int, height: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = width, height
        for number in range(4 * seconds):
            picture = np.full((height, width, 3), number % 251, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def test_the_papers_settings_are_the_defaults_of_spec_and_sweep_file() -> None:
    spec = ModelSpec(name="m", family="qwen2_5_omni", path="p")
    config = ModelConfig(name="m", family="qwen2_5_omni", path="p")
    for name, value in PAPER.items():
        assert getattr(spec, name) == getattr(config, name) == value
    assert spec.dtype == config.dtype == "bfloat16"
    assert spec.attention == config.attention == "sdpa"
    assert DEFAULT_SYSTEM_PROMPT == "You are a helpful assistant."


def test_they_are_part_of_what_a_run_is() -> None:
    config = ModelConfig(name="m", family="qwen2_5_omni", path="p")
    before = identity_fields(config)
    for name in (*PAPER, "system_prompt"):
        changed = config.model_copy(update={name: 7 if name in PAPER else "Look."})
        assert identity_fields(changed) != before, name


@pytest.mark.parametrize(
    ("seconds", "size", "frames"), [(3, (640, 480), 6), (70, (160, 120), 128), (2, (1920, 1080), 4)]
)
def test_videos_keep_to_2_frames_a_second_128_frames_and_144_tokens(
    model: Any, tmp_path: Path, seconds: int, size: tuple[int, int], frames: int
) -> None:
    write_video(tmp_path / "clip.mp4", seconds=seconds, width=size[0], height=size[1])
    sample = sample_of(MediaPart(kind="video", path="clip.mp4"))
    media = decode_sample(tmp_path, sample, model.media_spec)
    assert len(media[0].frames) == frames
    prepared = model.prepare(sample, media)
    tokens = [s.stop - s.start for s in prepared.layout.of("frame")]
    assert len(tokens) == frames // 2
    assert len(set(tokens)) == 1
    assert tokens[0] <= 144
    if size[0] >= 640:  # a large picture uses what it may
        assert tokens[0] > 100


def test_without_a_number_frames_keep_to_what_the_processor_gives_a_frame(tmp_path: Path) -> None:
    """The released file is made for images: it would allow 16,384 tokens a frame."""
    folder = build_tiny_checkpoint(tmp_path / "omni", n_layers=1)
    file = folder / "processor_config.json"
    processor = json.loads(file.read_text())
    for part in ("image_processor", "video_processor"):
        processor[part]["size"] = {"shortest_edge": 3136, "longest_edge": 12_845_056}
    file.write_text(json.dumps(processor))
    found = load(spec_of(folder, frame_tokens=None, image_tokens=None), "cpu").media_spec
    assert (found.frame_min_pixels, found.frame_max_pixels) == (3136, 768 * 28 * 28)
    assert found.image_max_pixels == 12_845_056


def test_images_keep_to_576_tokens(model: Any, tmp_path: Path) -> None:
    sizes = ((2000, 1500), (60, 60), (100, 3000))
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{number}.png")
    sample = sample_of(
        *(MediaPart(kind="image", path=f"{i}.png", role="candidate", index=i) for i in range(3))
    )
    prepared = model.prepare(sample, decode_sample(tmp_path, sample, model.media_spec))
    tokens = [s.stop - s.start for s in prepared.layout.of("candidate")]
    assert max(tokens) <= 576
    assert tokens[0] > 450


def test_the_papers_settings_are_the_defaults_and_memory_grows_with_them() -> None:
    spec = ModelConfig(name="m", family="qwen2_5_omni", path="p").spec()
    assert longest_prompt_of(spec) == PAPER_TOKENS
    info = PUBLISHED[1].info
    less, more = (needed_on_each(info, "bfloat16", n, 2**31) for n in (1000, PAPER_TOKENS))
    assert more > less > info.weight_bytes("bfloat16")
    need = Need(model="m", gpus=2, weights=17 << 30, peak=11 << 30, tokens=11_016)
    assert str(need) == (
        "m needs 11.0 GiB on each of 2 GPUs: weights 17.0 GiB in all, the rest for a prompt of "
        "11,016 tokens"
    )
