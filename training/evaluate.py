"""Step 3: judge the shipped checkpoint on held-out scenes and write its model card.

    python -m training.evaluate --work FOLDER [--samples N] [--knockouts N]

The real path throughout: files, PyAV, the real processor, the official model's own forward.
Accuracy with media intact, with each sense taken from another sample or masked, and a quick
knockout sweep with plain dense masks.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from avflow.datasets.testbed import TASKS, TaskInfo, load
from avflow.workers.models.base import LoadedModel, Prepared
from training import decoder, encoders
from training.card import write_card
from training.knockout import PATHWAYS, mean_changes
from training.prompts import forward_inputs, load_checkpoint, prepare

HELD_OUT_SEED = 77  # no training medium has this seed
CONDITIONS = ("intact", "video shuffled", "video masked", "audio shuffled", "audio masked")


@torch.no_grad()
def predicted(model: LoadedModel, prompt: Prepared, condition: str, donor: Prepared) -> int:
    """The token the model answers with, its media changed as `condition` says.

    Shuffled: the sense's input is that of `donor`, another sample of the task. Masked: the sense's
    tokens keep their places and are embedded as zeros.
    """
    inputs = forward_inputs(prompt)
    if condition == "video shuffled":
        inputs |= {k: v for k, v in donor.tensors.items() if k.startswith("pixel_values")}
    if condition == "audio shuffled":
        inputs |= {k: v for k, v in donor.tensors.items() if "feature" in k}
    hooks = []
    if condition.endswith("masked"):
        sense = condition.removesuffix(" masked")
        hooks.append(_blank(model.hf_model, prompt.tensors["input_ids"], sense))
    output = model.hf_model(**inputs)
    for hook in hooks:
        hook.remove()
    return int(output.logits[0, -1].argmax())


def _blank(model: nn.Module, ids: Tensor, sense: str) -> torch.utils.hooks.RemovableHandle:
    """Embed one sense's tokens as zeros from now on."""
    config = model.config
    sight = [config.video_token_id, config.image_token_id]
    hidden = torch.isin(ids, torch.tensor(sight if sense == "video" else [config.audio_token_id]))

    def blank(_module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> tuple:
        embeds = kwargs["inputs_embeds"].masked_fill(hidden[..., None], 0.0)
        return args, kwargs | {"inputs_embeds": embeds}

    return model.model.language_model.register_forward_pre_hook(blank, with_kwargs=True)


def accuracies(model: LoadedModel, prompts: list[Prepared]) -> dict[str, float]:
    """Accuracy of one task's prompts under each of `CONDITIONS`."""
    result = {}
    for condition in CONDITIONS:
        hits = 0
        for index, prompt in enumerate(prompts):
            donor = prompts[(index + 1) % len(prompts)]
            right = prompt.option_tokens[prompt.sample.answer]
            hits += predicted(model, prompt, condition, donor) == right
        result[condition] = hits / len(prompts)
    return result


def judge(
    task: TaskInfo, root: Path, n_samples: int, n_knockouts: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """One task's accuracies and knockout curves, in a process of its own."""
    torch.set_num_threads(1)
    model = load_checkpoint()
    samples = load(root, seed=HELD_OUT_SEED, samples_per_task=n_samples, tasks=(task.name,))
    prompts = [prepare(model, root, sample) for sample in samples]
    pathways = [pathway for pathway in PATHWAYS if pathway.layout == task.layout]
    return accuracies(model, prompts), mean_changes(model, prompts[:n_knockouts], pathways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200, help="held-out samples a task")
    parser.add_argument("--knockouts", type=int, default=16, help="samples a task knocked out")
    arguments = parser.parse_args()
    start = time.monotonic()
    root = arguments.work / "held-out"
    load(root, seed=HELD_OUT_SEED, samples_per_task=arguments.samples)  # renders
    table, changes = {}, {}
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        jobs = {
            task.name: pool.submit(judge, task, root, arguments.samples, arguments.knockouts)
            for task in TASKS
        }
        for name, job in jobs.items():
            table[name], changes[name] = job.result()
            print(name, json.dumps(table[name]), flush=True)
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
