"""Step 2: teach the decoder, hop by hop, on scenes composed from the bank of step 1.

    python -m training.decoder --work FOLDER [--steps N]

Encoders stay frozen (the bank holds their outputs). Linear heads at the layers named in
`batches.HEADS` say what a token should know by then, and are thrown away at the end. A task that
lags gets more questions; once every task has passed, the learning rate decays and training ends.
"""

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from training.batches import CLIP_TASKS, HEADS, TASK_NAMES, Batch, Composer
from training.flow import STAGE_OF_LAYER
from training.model import CHECKPOINT, HIDDEN, build_model, build_processor

SEED = 2000
N_CLIPS, N_MATCHING, ASKS = 20, 6, 6
LEARNING_RATE, WARM_UP, DECAY = 1.0e-3, 100, 300
GUIDED, GUIDED_LATE = 0.85, 0.5  # share of guided rows, before and during the decay
PASSED = 0.97
# Learned last: its question's anchor seeks a token's own class and wants its tag.
SHARE = {"colour_when_sound": 4.0}
REPORT_EVERY = 50


def hidden_states(
    model: Qwen2_5OmniThinkerForConditionalGeneration, batch: Batch, bank: dict
) -> list[Tensor]:
    """The residual stream [B, S, hidden] before the first layer and after each."""
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(batch.ids)
    for sense, (rows, at, items) in batch.media.items():
        hidden = hidden.index_put((rows, at), bank[sense]["features"][items])
    hidden = hidden.masked_fill(batch.blanked[..., None], 0.0)
    rotary = decoder.rotary_emb(hidden, batch.positions)
    states = [hidden]
    for layer, stage in zip(decoder.layers, STAGE_OF_LAYER, strict=True):
        hidden = layer(hidden, attention_mask=batch.masks[stage], position_embeddings=rotary)
        states.append(hidden)
    return states


def losses(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    heads: nn.ModuleDict,
    batch: Batch,
    bank: dict,
) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of each head and of the answer's letter; and which answers were right."""
    states = hidden_states(model, batch, bank)
    result = {}
    for name, (rows, at, targets) in batch.labels.items():
        if len(rows):
            result[name] = cross_entropy(heads[name](states[HEADS[name][0]][rows, at]), targets)
    logits = model.lm_head(model.model.language_model.norm(states[-1][batch.lasts]))
    result["letter"] = cross_entropy(logits, batch.letters)
    return result, logits.argmax(-1) == batch.letters


def train(model, tokenizer, bank, work: Path, max_steps: int) -> None:
    """Train the decoder and the LM head in place, from where `work/decoder.pt` left off if any."""
    heads = nn.ModuleDict(
        {
            name: nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, n))
            for name, (_, n) in HEADS.items()
        }
    )
    first = 1
    if (work / "decoder.pt").exists():
        saved = torch.load(work / "decoder.pt")
        model.load_state_dict(saved["model"])
        heads.load_state_dict(saved["heads"], strict=False)
        first = saved["step"] + 1
    warm_up = WARM_UP if first == 1 else WARM_UP // 3
    composer = Composer(model, tokenizer, bank, Random(SEED + first))
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimiser = torch.optim.AdamW(
        [*trained, *heads.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    accuracy = torch.full((len(TASK_NAMES),), 0.25)
    seen: dict[str, float] = {}
    start, decay_from = time.monotonic(), None
    for step in range(first, max_steps + 1):
        left = 1.0 if decay_from is None else 1 - (step - decay_from) / DECAY
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step - first + 1) / warm_up) * max(left, 0.02)
        lag = (1.15 - accuracy[: len(CLIP_TASKS)]).tolist()
        weights = [SHARE.get(n, 1.0) * x for n, x in zip(CLIP_TASKS, lag, strict=True)]
        guided = GUIDED if decay_from is None else GUIDED_LATE
        batch = composer.batch(N_CLIPS, N_MATCHING, weights, ASKS, guided)
        parts, right = losses(model, heads, batch, bank)
        optimiser.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        for task in range(len(TASK_NAMES)):
            asked = (batch.tasks == task) & batch.full
            if asked.any():
                accuracy[task] += 0.04 * (right[asked].float().mean() - accuracy[task])
        for name, loss in parts.items():
            seen[name] = 0.9 * seen.get(name, loss.item()) + 0.1 * loss.item()
        if step % REPORT_EVERY == 0:
            line = {"step": step, "seconds": round(time.monotonic() - start)}
            line["decay_from"] = decay_from
            line["accuracy"] = {n: round(float(accuracy[i]), 3) for i, n in enumerate(TASK_NAMES)}
            line["loss"] = {name: round(value, 3) for name, value in seen.items()}
            _report(work, line)
            state = {"step": step, "model": model.state_dict(), "heads": heads.state_dict()}
            torch.save(state, work / "decoder.pt")
        if decay_from is None and (accuracy.min() > PASSED or step >= max_steps - DECAY):
            decay_from = step
        if decay_from is not None and step >= decay_from + DECAY:
            break


def _report(work: Path, line: dict) -> None:
    with (work / "decoder.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000, help="at most so many")
    arguments = parser.parse_args()
    work = arguments.work
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    model.load_state_dict(torch.load(work / "model.pt"))
    train(model, processor.tokenizer, torch.load(work / "bank.pt"), work, arguments.steps)
    model.save_pretrained(CHECKPOINT)
    processor.save_pretrained(CHECKPOINT)


if __name__ == "__main__":
    main()
