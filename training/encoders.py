"""Step 1: teach the two encoders to tell colours and sounds apart, on really decoded media.

    python -m training.encoders --work FOLDER

Renders a training set (seeds of its own), decodes and processes it as any prompt's media are,
trains the vision and the audio tower (with their projectors) to name the class at each of their
output tokens through a linear head that is thrown away, then writes to FOLDER the model
(`model.pt`) and the bank of features (`bank.pt`) that step 2 composes scenes from.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from avflow.datasets.testbed.render import render_clip, render_image, render_sound
from avflow.datasets.testbed.world import N_CLASSES, sample_scene
from training.media import clip_inputs, image_inputs, sound_inputs
from training.model import HIDDEN, build_model, build_processor

SEED = 1000  # training media; held-out media use other seeds (see training.evaluate)
N_CLIPS, N_STANDALONE = 700, 60  # clips; images a colour and sounds a sound
STEPS, BATCH, LEARNING_RATE = 400, 96, 2e-3
PATCHES = 16  # a second of video or an image


@dataclass(frozen=True, slots=True)
class Items:
    """Single seconds (or standalone items) of one sense: inputs, class, and whether standalone."""

    inputs: Tensor  # [n, 16, 1176] patches or [n, bins, 20] mel frames
    classes: Tensor  # [n]
    standalone: Tensor  # bool [n]


def collect(processor: Qwen2_5OmniProcessor, folder: Path) -> tuple[Items, Items]:
    """Render, decode and process the training media: (seconds of sight, seconds of sound)."""
    sights: list[tuple[Tensor, int, bool]] = []
    sounds: list[tuple[Tensor, int, bool]] = []
    for index in range(N_CLIPS):
        scene = sample_scene(Random(f"{SEED}:scene:{index}"))
        path = folder / f"clips/{index:05d}.mp4"
        if not path.exists():
            render_clip(scene, path)
        patches, mel = clip_inputs(processor, path)
        seconds = zip(
            patches.split(PATCHES),
            mel.chunk(scene.seconds, 1),
            scene.colours,
            scene.sounds,
            strict=True,
        )
        for patch, bins, colour, sound in seconds:
            sights.append((patch, colour, False))
            sounds.append((bins, sound, False))
    for class_ in range(N_CLASSES):
        for variant in range(N_STANDALONE):
            image = folder / f"images/{class_}-{variant:03d}.png"
            wave = folder / f"sounds/{class_}-{variant:03d}.wav"
            render_image(class_, SEED * N_STANDALONE + variant, image)
            render_sound(class_, SEED * N_STANDALONE + variant, wave)
            sights.append((image_inputs(processor, image), class_, True))
            sounds.append((sound_inputs(processor, wave), class_, True))
    return _stack(sights), _stack(sounds)


def _stack(rows: list[tuple[Tensor, int, bool]]) -> Items:
    return Items(
        inputs=torch.stack([row[0] for row in rows]),
        classes=torch.tensor([row[1] for row in rows]),
        standalone=torch.tensor([row[2] for row in rows]),
    )


def encode_sight(model: Qwen2_5OmniThinkerForConditionalGeneration, patches: Tensor) -> Tensor:
    """Patches [n, 16, 1176] to video tokens [n, 4, hidden], as if they were one clip's seconds."""
    grid = torch.tensor([[len(patches), 4, 4]])
    features = model.model.get_video_features(patches.flatten(0, 1), grid).pooler_output
    return torch.cat(tuple(features)).view(len(patches), -1, HIDDEN)


def encode_sound(model: Qwen2_5OmniThinkerForConditionalGeneration, mel: Tensor) -> Tensor:
    """Mel frames [n, bins, 20] to audio tokens [n, 5, hidden]."""
    mask = torch.ones(len(mel), mel.shape[2], dtype=torch.long)
    return model.model.get_audio_features(mel, mask).last_hidden_state.view(len(mel), -1, HIDDEN)


def train(model: Qwen2_5OmniThinkerForConditionalGeneration, items: Items, encode) -> float:
    """Train one tower to name the class at each token; the last 50 steps' accuracy."""
    tower = model.model.visual if encode is encode_sight else model.model.audio_tower
    head = nn.Linear(HIDDEN, N_CLASSES)
    parameters = [*tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=STEPS)
    hits = []
    for _ in range(STEPS):
        rows = torch.randint(len(items.classes), (BATCH,))
        tokens = encode(model, items.inputs[rows])
        labels = items.classes[rows, None].expand(tokens.shape[:2])
        logits = head(tokens)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        hits.append((logits.argmax(-1) == labels).float().mean().item())
    return sum(hits[-50:]) / 50


@torch.no_grad()
def bank(model: Qwen2_5OmniThinkerForConditionalGeneration, items: Items, encode) -> dict:
    """The features of all items, for step 2."""
    features = torch.cat([encode(model, part) for part in items.inputs.split(256)])
    return {"features": features, "classes": items.classes, "standalone": items.standalone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    start = time.monotonic()
    processor = build_processor()
    model = build_model(processor.tokenizer)
    sights, sounds = collect(processor, work / "media")
    print(f"media: {time.monotonic() - start:.0f} s", flush=True)
    for name, items, encode in (("sight", sights, encode_sight), ("sound", sounds, encode_sound)):
        accuracy = train(model, items, encode)
        print(f"{name}: {accuracy:.2%} after {time.monotonic() - start:.0f} s", flush=True)
    model.eval()
    torch.save(
        {"sight": bank(model, sights, encode_sight), "sound": bank(model, sounds, encode_sound)},
        work / "bank.pt",
    )
    torch.save(model.state_dict(), work / "model.pt")


if __name__ == "__main__":
    main()
