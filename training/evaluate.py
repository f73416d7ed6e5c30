"""Step 3: judge the shipped checkpoint on held-out scenes and write its model card.

    python -m training.evaluate --work FOLDER [--samples N] [--knockouts N]

The real path throughout: files, PyAV, the real processor, the official model's own forward.
Accuracy with media intact, with each sense taken from another sample or masked, and a quick
knockout sweep with plain dense masks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from avflow.datasets.sample import LETTERS, Sample
from avflow.datasets.testbed import TASKS, load
from training import decoder, encoders
from training.card import write_card
from training.knockout import PATHWAYS, mean_changes
from training.model import CHECKPOINT
from training.prompts import Prompt, prepare

HELD_OUT_SEED = 77  # no training medium has this seed
INTACT = "intact"
CONDITIONS = (INTACT, "video shuffled", "video masked", "audio shuffled", "audio masked")

Model = Qwen2_5OmniThinkerForConditionalGeneration


def load_checkpoint() -> tuple[Model, Qwen2_5OmniProcessor]:
    """The shipped model and processor, as any checkpoint is loaded."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    return model, Qwen2_5OmniProcessor.from_pretrained(CHECKPOINT)


@torch.no_grad()
def predicted(model: Model, prompt: Prompt, condition: str, donor: Prompt) -> int:
    """The token the model answers with, its media changed as `condition` says.

    Shuffled: the sense's input is that of `donor`, another sample of the task. Masked: the sense's
    tokens keep their places and are embedded as zeros.
    """
    if condition.endswith("masked"):
        return int(_masked_logits(model, prompt, condition.split(maxsplit=1)[0]).argmax())
    tensors = dict(prompt.tensors)
    if condition == "video shuffled":
        tensors |= {k: v for k, v in donor.tensors.items() if k.startswith("pixel_values")}
    if condition == "audio shuffled":
        tensors |= {k: v for k, v in donor.tensors.items() if "feature" in k}
    output = model(**tensors, use_audio_in_video=prompt.is_clip)
    return int(output.logits[0, -1].argmax())


def _masked_logits(model: Model, prompt: Prompt, sense: str) -> Tensor:
    """Logits at the last position with one sense's tokens embedded as zeros."""
    config = model.config
    ids = {
        "video": (config.video_token_id, config.image_token_id),
        "audio": (config.audio_token_id,),
    }[sense]

    def blank(_module: nn.Module, _args: object, kwargs: dict[str, Tensor]) -> tuple:
        hidden = torch.isin(prompt.tensors["input_ids"], torch.tensor(ids))
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].masked_fill(hidden[..., None], 0.0)
        return (), kwargs

    hook = model.model.language_model.register_forward_pre_hook(blank, with_kwargs=True)
    try:
        output = model(**prompt.tensors, use_audio_in_video=prompt.is_clip)
    finally:
        hook.remove()
    return output.logits[0, -1]


def accuracies(model: Model, letters: list[int], prompts: list[Prompt]) -> dict[str, float]:
    """Accuracy of one task's prompts under each of `CONDITIONS`."""
    result = {}
    for condition in CONDITIONS:
        hits = 0
        for index, prompt in enumerate(prompts):
            donor = prompts[(index + 1) % len(prompts)]
            token = predicted(model, prompt, condition, donor)
            hits += token == letters[prompt.sample.answer]
        result[condition] = hits / len(prompts)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=240, help="held-out samples a task")
    parser.add_argument("--knockouts", type=int, default=24, help="samples a task knocked out")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    start = time.monotonic()
    model, processor = load_checkpoint()
    letters = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS[:4]]
    root = arguments.work / "held-out"
    samples = load(root, seed=HELD_OUT_SEED, samples_per_task=arguments.samples)
    table, changes = {}, {}
    for task in TASKS:
        own: list[Sample] = [sample for sample in samples if sample.task == task.name]
        prompts = [prepare(processor, root, sample) for sample in own]
        table[task.name] = accuracies(model, letters, prompts)
        pathways = [pathway for pathway in PATHWAYS if pathway.layout == task.layout]
        chosen = prompts[: arguments.knockouts]
        changes[task.name] = mean_changes(model, chosen, letters, pathways)
        print(task.name, json.dumps(table[task.name]), flush=True)
        print(json.dumps(changes[task.name]), flush=True)
    (arguments.work / "evaluation.json").write_text(
        json.dumps({"accuracy": table, "knockout": changes}, indent=1)
    )
    facts = {
        "samples": arguments.samples,
        "knockouts": arguments.knockouts,
        "evaluation_seconds": round(time.monotonic() - start),
        "held_out_seed": HELD_OUT_SEED,
        "encoder_seed": encoders.SEED,
        "clips": encoders.N_CLIPS,
        "standalone": encoders.N_STANDALONE,
        "decoder_seed": decoder.SEED,
        "rows": decoder.N_CLIPS + decoder.N_MATCHING,
    }
    write_card(arguments.work, facts=facts)


if __name__ == "__main__":
    main()
