"""The model card: what the checkpoint is, how it came about and what it was measured to do."""

import json
from itertools import pairwise
from pathlib import Path

from avflow.datasets.testbed import TASKS
from training.model import CHECKPOINT

_HEAD = """\
# The testbed model

A tiny audio-visual language model, trained from scratch on avflow's synthetic world
(`datasets/testbed`) so that its flow of information is known. It is the official
`Qwen2_5OmniThinkerForConditionalGeneration` with a small config and loads as any checkpoint of
that class does, with `Qwen2_5OmniProcessor`. It answers the testbed's questions and nothing else.

| | |
|---|---|
| decoder | {layers} layers, hidden {hidden}, {heads} heads ({kv} for keys and values) |
| vision tower | {vision} layers, one second (2 frames of 56 x 56 pixels) = 4 tokens |
| audio tower | {audio} layers, one second (20 mel frames) = 5 tokens |
| vocabulary | {vocab} tokens (byte-level BPE, any text tokenises) |
| interleaving | chunks of 1 s, 5 position ids a second |
| weights | float32, {megabytes:.1f} MB |
| system prompt | "You are a helpful assistant." (the chat template's default) |

Neither encoder lets one second see another, so what passes between seconds passes in the decoder.
"""

_TRAINING = """\
## Training

1. `python -m training.encoders --work FOLDER`: both towers learn to name the colour or sound at
   each of their tokens, on {clips} rendered and decoded clips and {standalone} images and wavs a
   class (seed {encoder_seed}). Then they are frozen, and their outputs are the bank from which
   step 2 composes scenes without end.
2. `python -m training.decoder --work FOLDER`: {steps} steps of {rows} sequences (seed
   {decoder_seed}), {seconds} s of wall time on two CPU cores shared with other work.
   Each hop has labels of its own at the layer where it should be done: tags on media tokens after
   layer 2 (own class, the second before, the other sense), the answer on the question's anchor word
   (or the candidate's place on the reference) after layer 4, the same on the options after layer 5,
   "my letter, or not me" on the options after layer 6, the letter at the last token. The linear
   heads that read these are thrown away. The questions of a sequence share the media but cannot see
   each other. Most training sequences are *guided*: masks leave each hop only its own layers, and
   some block one hop inside the media (or blank a sense) and ask only what does not need it
   (`training/flow.py`). So the flow below is by design; the checkpoint itself has the official
   forward pass and a plain causal mask.
   This checkpoint was trained in four legs, each resumed with a fresh optimiser (the command given
   again): steps 1 to 1000 and to 1800 at a learning rate of 1.5e-3, the rules in equal shares on
   40% of the clips and a double share of `colour_when_sound`; to 2300 with a fourfold share and
   the rate decaying over 500 steps; to 2600 with the constants as they stand in the code. One run
   with these constants from the start has not been made.
3. `python -m training.evaluate --work FOLDER`: everything below (seed {held_out_seed}: scenes,
   images and sounds that were never seen in training), {evaluation_seconds} s.
"""


def write_card(work: Path, *, facts: dict[str, int]) -> None:
    """Write README.md into the checkpoint's folder from what the steps left in `work`."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    text, weights = config["text_config"], CHECKPOINT / "model.safetensors"
    log = [json.loads(line) for line in (work / "decoder.jsonl").read_text().splitlines()]
    evaluation = json.loads((work / "evaluation.json").read_text())
    parts = [
        _HEAD.format(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            heads=text["num_attention_heads"],
            kv=text["num_key_value_heads"],
            vision=config["vision_config"]["depth"],
            audio=config["audio_config"]["encoder_layers"],
            vocab=text["vocab_size"],
            megabytes=weights.stat().st_size / 1e6,
        ),
        _TRAINING.format(steps=log[-1]["step"], seconds=_seconds(log), **facts),
        _accuracy(evaluation["accuracy"], facts["samples"]),
        _knockouts(evaluation["knockout"], facts["knockouts"]),
    ]
    (CHECKPOINT / "README.md").write_text("\n".join(parts))


def _seconds(log: list[dict]) -> int:
    """Wall time over all legs: the log's clock starts again where training was resumed."""
    ends = [a for a, b in pairwise(log) if b["seconds"] < a["seconds"]]
    return sum(line["seconds"] for line in [*ends, log[-1]])


def _accuracy(table: dict[str, dict[str, float]], samples: int) -> str:
    conditions = list(next(iter(table.values())))
    lines = [
        "## Accuracy on held-out scenes, per cent",
        "",
        f"{samples} samples a task, from the media files on, by the official forward pass.",
        "Shuffled: the sense is another sample's. Masked: its tokens are embedded as zeros.",
        "Chance is 25.",
        "For the matching tasks, video means the images and audio the wavs.",
        "",
        f"| task | needs | {' | '.join(conditions)} |",
        "|---|---|" + "---:|" * len(conditions),
    ]
    for task in TASKS:
        cells = " | ".join(f"{100 * table[task.name][c]:.1f}" for c in conditions)
        lines.append(f"| `{task.name}` | {' and '.join(task.needs)} | {cells} |")
    return "\n".join(lines) + "\n"


def _knockouts(changes: dict[str, dict[str, list[float]]], samples: int) -> str:
    lines = [
        "## Knockouts",
        "",
        "Mean relative change of the answer's probability, per cent, centre layers 0 to 7, window",
        f"k = 3, {samples} held-out samples a task, dense masks. `.` is within 2 per cent of zero.",
    ]
    for layout in ("single_video", "interleaved"):
        tasks = [task.name for task in TASKS if task.layout == layout]
        lines += ["", f"| pathway | {' | '.join(f'`{t}`' for t in tasks)} |"]
        lines.append("|---|" + "---|" * len(tasks))
        for pathway in changes[tasks[0]]:
            cells = " | ".join(_curve(changes[task][pathway]) for task in tasks)
            lines.append(f"| `{pathway}` | {cells} |")
    return "\n".join(lines) + "\n"


def _curve(values: list[float]) -> str:
    if all(abs(value) <= 0.02 for value in values):
        return "."
    return " ".join("." if abs(v) <= 0.02 else f"{100 * v:.0f}" for v in values)
