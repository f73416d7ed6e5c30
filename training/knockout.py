"""A quick knockout sweep with dense masks: does information flow as the labels meant it to?

Not the product's engine: one full forward per (pathway, centre layer), a bool mask put into the
windowed layers by a hook on each layer's attention.
"""

import torch
from torch import Tensor, nn

from avflow.pathways.catalogue import ALL
from avflow.pathways.pathway import Pathway, blocked_segments
from avflow.pathways.windows import window_layers
from avflow.workers.models.base import Embedded, LoadedModel, Prepared, embed

WINDOW = 3
_SHOWN = (
    "cross_frame",
    "cross_audio",
    "video_to_audio",
    "audio_to_video",
    "video_to_question",
    "audio_to_question",
    "video_to_non_option_question",
    "audio_to_non_option_question",
    "question_to_last",
    "non_option_question_to_last",
    "true_option_to_last",
    "video_to_last",
    "audio_to_last",
    "cross_candidate",
    "candidates_to_reference",
    "candidates_to_question",
    "question_to_reference",
    "reference_to_last",
    "candidates_to_last",
    "correct_option_to_last",
)
PATHWAYS: tuple[Pathway, ...] = tuple(p for p in ALL if p.name in _SHOWN)


@torch.no_grad()
def mean_changes(
    model: LoadedModel, prompts: list[Prepared], pathways: list[Pathway]
) -> dict[str, list[float]]:
    """Mean relative change of the answer's probability: by pathway, per centre layer.

    Over the prompts that the model answers correctly.
    """
    layers = model.decoder.layers
    changes: dict[str, list[list[float]]] = {pathway.name: [] for pathway in pathways}
    for prompt in prompts:
        answer = prompt.option_tokens[prompt.sample.answer]
        embedded = embed(model, prompt)
        base = _probabilities(model, embedded)
        if int(base.argmax()) != answer:
            continue
        for pathway in pathways:
            mask = _mask(prompt, pathway)
            row = []
            for centre in range(len(layers)):
                window = window_layers(centre, WINDOW, len(layers))
                hooks = [_mask_layer(layers[layer], mask) for layer in window]
                knocked = _probabilities(model, embedded)[answer]
                for hook in hooks:
                    hook.remove()
                row.append(float((knocked - base[answer]) / base[answer]))
            changes[pathway.name].append(row)
    return {name: torch.tensor(rows).mean(0).tolist() for name, rows in changes.items()}


def _mask(prompt: Prepared, pathway: Pathway) -> Tensor:
    """bool [1, 1, N, N], True = may attend."""
    segment = prompt.layout.segment_of_position
    blocked = blocked_segments(prompt.layout, pathway)[segment][:, segment]
    allowed = ~torch.from_numpy(blocked)
    return (allowed & torch.ones_like(allowed).tril())[None, None]


def _mask_layer(layer: nn.Module, mask: Tensor) -> torch.utils.hooks.RemovableHandle:
    def put(_module: nn.Module, args: tuple, kwargs: dict[str, object]) -> tuple:
        return args, kwargs | {"attention_mask": mask}

    return layer.self_attn.register_forward_pre_hook(put, with_kwargs=True)


def _probabilities(model: LoadedModel, embedded: Embedded) -> Tensor:
    """Probabilities over the vocabulary at the last position."""
    output = model.hf_model.model.language_model(
        inputs_embeds=embedded.inputs_embeds,
        position_ids=embedded.position_ids,
        use_cache=False,
    )
    return model.decoder.lm_head(output.last_hidden_state[0, -1]).softmax(-1)
