"""A quick knockout sweep with dense masks: does information flow as the labels meant it to?

Not the product's engine: one full forward per (pathway, centre layer), a bool mask put into the
windowed layers by a hook on each layer's attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from avflow.datasets.sample import LayoutKind
from training.prompts import Prompt, flat

WINDOW = 3


@dataclass(frozen=True, slots=True)
class Blocked:
    """A pathway: `sources` are hidden from `targets`; `across`: between units of one group."""

    layout: LayoutKind
    name: str
    sources: str
    targets: str
    across: bool = False


_CLIP = "single_video"
_ITEMS = "interleaved"
PATHWAYS = (
    Blocked(_CLIP, "cross_frame", "video", "video", across=True),
    Blocked(_CLIP, "cross_audio", "audio", "audio", across=True),
    Blocked(_CLIP, "video_to_audio", "video", "audio"),
    Blocked(_CLIP, "audio_to_video", "audio", "video"),
    Blocked(_CLIP, "video_to_question", "video", "question"),
    Blocked(_CLIP, "audio_to_question", "audio", "question"),
    Blocked(_CLIP, "video_to_non_option_question", "video", "non_option_question"),
    Blocked(_CLIP, "audio_to_non_option_question", "audio", "non_option_question"),
    Blocked(_CLIP, "question_to_last", "question", "last"),
    Blocked(_CLIP, "non_option_question_to_last", "non_option_question", "last"),
    Blocked(_CLIP, "true_option_to_last", "true_option", "last"),
    Blocked(_CLIP, "video_to_last", "video", "last"),
    Blocked(_CLIP, "audio_to_last", "audio", "last"),
    Blocked(_ITEMS, "cross_candidate", "candidates", "candidates", across=True),
    Blocked(_ITEMS, "candidates_to_reference", "candidates", "reference"),
    Blocked(_ITEMS, "question_to_reference", "question", "reference"),
    Blocked(_ITEMS, "candidates_to_question", "candidates", "question"),
    Blocked(_ITEMS, "reference_to_last", "reference", "last"),
    Blocked(_ITEMS, "candidates_to_last", "candidates", "last"),
    Blocked(_ITEMS, "question_to_last", "question", "last"),
    Blocked(_ITEMS, "true_option_to_last", "true_option", "last"),
)


def block_matrix(prompt: Prompt, pathway: Blocked) -> Tensor:
    """bool [N, N], True where the query (row) may not read the key (column)."""
    n = prompt.tensors["input_ids"].shape[1]
    blocked = torch.zeros(n, n, dtype=torch.bool)
    sources, targets = prompt.groups[pathway.sources], prompt.groups[pathway.targets]
    if not pathway.across:
        blocked[torch.tensor(flat(targets))[:, None], torch.tensor(flat(sources))] = True
        return blocked
    for unit in targets:
        others = [position for other in sources if other != unit for position in other]
        blocked[torch.tensor(unit)[:, None], torch.tensor(others)] = True
    return blocked


@torch.no_grad()
def mean_changes(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    prompts: list[Prompt],
    letters: list[int],
    pathways: list[Blocked],
) -> dict[str, list[float]]:
    """Mean relative change of the answer's probability: by pathway, per centre layer.

    Over the prompts that the model answers correctly.
    """
    layers = model.model.language_model.layers
    changes: dict[str, list[list[float]]] = {pathway.name: [] for pathway in pathways}
    for prompt in prompts:
        answer = letters[prompt.sample.answer]
        inputs = _decoder_inputs(model, prompt)
        base = _probabilities(model, inputs)
        if int(base.argmax()) != answer:
            continue
        for pathway in pathways:
            blocked = block_matrix(prompt, pathway)
            mask = (torch.ones_like(blocked).tril() & ~blocked)[None, None]
            row = []
            for centre in range(len(layers)):
                window = layers[max(0, centre - WINDOW // 2) : centre + WINDOW // 2 + 1]
                hooks = [_mask_layer(layer, mask) for layer in window]
                knocked = _probabilities(model, inputs)[answer]
                for hook in hooks:
                    hook.remove()
                row.append(float((knocked - base[answer]) / base[answer]))
            changes[pathway.name].append(row)
    return {name: torch.tensor(rows).mean(0).tolist() for name, rows in changes.items()}


def _mask_layer(layer: nn.Module, mask: Tensor) -> torch.utils.hooks.RemovableHandle:
    def put(_module: nn.Module, args: tuple, kwargs: dict[str, object]) -> tuple:
        return args, kwargs | {"attention_mask": mask}

    return layer.self_attn.register_forward_pre_hook(put, with_kwargs=True)


def _decoder_inputs(
    model: Qwen2_5OmniThinkerForConditionalGeneration, prompt: Prompt
) -> dict[str, Tensor]:
    """What the model's own forward hands to its decoder: embeddings and positions."""
    taken: dict[str, Tensor] = {}

    def take(_module: nn.Module, _args: tuple, kwargs: dict[str, Tensor]) -> None:
        taken.update({name: kwargs[name] for name in ("inputs_embeds", "position_ids")})

    hook = model.model.language_model.register_forward_pre_hook(take, with_kwargs=True)
    model(**prompt.tensors, use_audio_in_video=prompt.is_clip)
    hook.remove()
    return taken


def _probabilities(
    model: Qwen2_5OmniThinkerForConditionalGeneration, inputs: dict[str, Tensor]
) -> Tensor:
    """Probabilities over the vocabulary at the last position."""
    hidden = model.model.language_model(**inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[0, -1]).softmax(-1)
