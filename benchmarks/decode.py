"""How many CPU cores decode for one GPU: this decoder against the reference's way of reading.

    python benchmarks/decode.py                          one 30 s clip, 720p, 30 frames a second
    python benchmarks/decode.py --gpu-seconds 4.5        with a measured time of the engine

The reference does what qwen-omni-utils does with its settings of the paper (2 frames a second, at
most 128, at most 144 tokens a frame pair): it decodes the whole video, takes the sampled frames at
full size as RGB, makes them smaller in torch (bicubic, antialiased), then opens the file again for
the sound, decodes all of it at its own rate and resamples it. That package is not installed with
avflow, so its way is written out here; its torchvision backend even turned *all* frames into RGB,
which is left out in its favour.

Time is CPU time of all threads, the median of the repeats: a core's worth, whatever else runs.
The GPU's time a sample is that of a plan (the 3B model, every centre layer, an H100 at the share
of its peak that `avflow plan` assumes, encoders left out), for all 22 single-video pathways and for
the cheapest alone, where decoding weighs most.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from avflow.datasets.decoder import Decoder
from avflow.datasets.media import MediaSpec, decode_media
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.sampling import fit
from avflow.orchestrator.config import ModelConfig
from avflow.orchestrator.cost import CLIP_S, nominal_layout
from avflow.orchestrator.estimate import gpu_hours, of_unit
from avflow.orchestrator.known_models import BYTE_BUDGET, PUBLISHED
from avflow.pathways.catalogue import SINGLE_VIDEO, find
from avflow.pathways.pathway import Pathway
from avflow.workers.protocol import CurveSpec, UnitSpec

SPEC = MediaSpec(
    fps=2,
    max_frames=128,
    temporal_patch=2,
    frame_min_pixels=128 * 28 * 28,
    frame_max_pixels=144 * 28 * 28,
    image_min_pixels=4 * 28 * 28,
    image_max_pixels=576 * 28 * 28,
    patch_multiple=28,
    sample_rate=16_000,
    max_audio_s=300,
)
(QWEN_3B,) = (known.info for known in PUBLISHED if known.checkpoint == "Qwen/Qwen2.5-Omni-3B")
SWEEPS = {"all 22 pathways": SINGLE_VIDEO, "question_to_last": find("question_to_last")[:1]}
CLIP = MediaPart(kind="video", path="clip.mp4", with_audio=True)
RATE = 44_100
SIZE = (720, 1280)


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / CLIP.path
        write_clip(path, options.seconds)
        with Decoder() as decoder:
            timed = _timed(
                {
                    "avflow": lambda: decode_media(path.parent, CLIP, SPEC),
                    "reference": lambda: reference(path, SPEC),
                    # What a sweep does; the child's CPU time is not ours to see.
                    "avflow, handed over": lambda: decoder.decode(path.parent, CLIP, SPEC),
                },
                options.repeats,
            )
        megabits = path.stat().st_size * 8e-6 / options.seconds
    gpu_s = (
        {"measured": options.gpu_seconds}
        if options.gpu_seconds
        else {what: nominal_gpu_seconds(options.seconds, of) for what, of in SWEEPS.items()}
    )
    cpu = {way: timed[way]["cpu_s"] for way in ("avflow", "reference")}
    result: dict[str, Any] = {
        "clip": f"{options.seconds:g} s, {SIZE[1]}x{SIZE[0]}, 30 frames/s, {megabits:.1f} Mbit/s",
        "ways": timed,
        "samples_per_core_second": {way: 1 / value for way, value in cpu.items()},
        "speedup": cpu["reference"] / cpu["avflow"],
        "gpu_s": gpu_s,
        "cores_for_one_gpu": {
            what: {way: value / busy_s for way, value in cpu.items()}
            for what, busy_s in gpu_s.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30, help="of the clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--gpu-seconds", type=float, help="of the engine, a sample; default: planned"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def write_clip(path: Path, seconds: float) -> None:
    """H.264 and AAC, at a bit rate that such clips have: shapes that move before a noisy ground."""
    rng = np.random.default_rng(0)
    ground = rng.integers(40, 200, (SIZE[0] // 8, SIZE[1] // 8 + 160, 3), dtype=np.uint8)
    ground = np.asarray(ground.repeat(8, axis=0).repeat(8, axis=1))
    grain = rng.integers(0, 12, (16, *SIZE, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=30)
        video.height, video.width = SIZE
        video.pix_fmt = "yuv420p"
        video.bit_rate = 2_000_000  # B-frames and their pyramid as x264 sets them
        video.options = {"preset": "veryfast"}
        sound = container.add_stream("aac", rate=RATE, layout="stereo")
        for i in range(round(seconds * 30)):
            left = i % 1200
            picture = ground[:, left : left + SIZE[1]] + grain[rng.integers(len(grain))]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        hiss = rng.normal(0, 0.05, (2, round(seconds * RATE)))
        tone = 0.2 * np.sin(np.arange(hiss.shape[1]) * 2 * np.pi * 440 / RATE)
        track = av.AudioFrame.from_ndarray(
            (hiss + tone).astype(np.float32), format="fltp", layout="stereo"
        )
        track.sample_rate, track.pts = RATE, 0
        container.mux(sound.encode(track))
        container.mux(sound.encode(None))


def reference(path: Path, spec: MediaSpec) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Frames [T, 3, H, W] float32 and the wave [n], as qwen-omni-utils reads them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        total, rate = stream.frames, float(stream.average_rate or 30)
        n_frames = min(spec.max_frames, int(total / rate * spec.fps)) // 2 * 2
        wanted = set(np.linspace(0, total - 1, n_frames).round().astype(int).tolist())
        kept = [
            frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        ]
    frames = torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2)
    full_height, full_width = kept[0].shape[:2]
    height, width = fit(full_height, full_width, spec.frame_max_pixels, spec.patch_multiple)
    small = functional.resize(
        frames, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
    ).float()
    return small, _reference_sound(path, spec.sample_rate)


def _reference_sound(path: Path, rate: int) -> NDArray[np.float32]:
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        pieces = [frame.to_ndarray() for frame in container.decode(track)]
        stereo = np.concatenate(pieces, axis=1)
        step = np.gcd(rate, track.rate)
        mono = stereo.mean(axis=0)
        return np.asarray(resample_poly(mono, rate // step, track.rate // step), dtype=np.float32)


def nominal_gpu_seconds(clip_s: float, pathways: Sequence[Pathway]) -> float:
    """The plan's time on one H100 for a sample with these pathways, window 7."""
    curves = tuple(
        CurveSpec(pathway=pathway, window=7, center_layers=tuple(range(QWEN_3B.n_layers)))
        for pathway in pathways
    )
    model = ModelConfig(name="3B", family="qwen2_5_omni", path="unused")
    sample = Sample(
        sample_id="1",
        dataset="d",
        task="t",
        category="c",
        layout="single_video",
        parts=(CLIP, *multiple_choice("How often does the bell ring? " * 4, ("once", "twice"))),
        answer=0,
        media_group="g",
    )
    unit = UnitSpec(
        unit_id="1",
        model=model.name,
        data_root=".",
        sample=sample,
        curves=curves,
        wanted=frozenset(curve.key for curve in curves),
        byte_budget=BYTE_BUDGET,
        cost=0.0,
    )
    planned = of_unit(unit, nominal_layout(sample, model), QWEN_3B)
    return gpu_hours(planned.shared, "H100") * 3600 * clip_s / CLIP_S


def _timed(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians over the repeats, the ways in turn, after a first run that is not counted."""
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for run in ways.values():
        run()
    for _ in range(repeats):
        for way, run in ways.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            seen[way].append((time.perf_counter() - began, time.process_time() - began_cpu))
    return {
        way: {"wall_s": median(w for w, _ in each), "cpu_s": median(c for _, c in each)}
        for way, each in seen.items()
    }


if __name__ == "__main__":
    main()
