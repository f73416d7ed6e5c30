"""video-SALMONN 2+: from the released checkpoints' names to the module's, and none left over."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from avflow.workers.models.base import ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import weight_files

COMPLETE = "tsinghua-ee/video-SALMONN2_plus_3B_full or tsinghua-ee/video-SALMONN2_plus_7B_full"
# The first pattern that fits a name renames it.
_RENAMED: tuple[tuple[str, str], ...] = (
    (r"visual\.", "model.visual."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"audio\.(conv1|conv2|embed_positions|layers|layer_norm)\.", r"audio.encoder.\1."),
    (r"audio\.qformer\.bert\.embeddings\.LayerNorm\.", "audio.qformer.layernorm."),
    (
        r"audio\.qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"audio.qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"audio\.qformer\.bert\.encoder\.layer\.", "audio.qformer.encoder.layer."),
)
_NOT_WEIGHTS = ("audio.qformer.bert.embeddings.position_ids",)  # a buffer of counted numbers
_ADAPTER = "base_model.model."
_ADAPTER_IDS = re.compile(r"tsinghua-ee/video-SALMONN-2_plus_\d+B")
_SHOWN = 5


def module_name(name: str) -> str:
    """The module's name of a released tensor; an unknown one stays as it is."""
    for pattern, replacement in _RENAMED:
        renamed, n = re.subn(rf"\A{pattern}", replacement, name)
        if n:
            return renamed
    return name


def refuse_adapter_id(spec: ModelSpec) -> None:
    """Raises UnsupportedModelError for the authors' LoRA repositories, before anything is fetched.

    A LoRA adapter can't be merged into a whole model: see docs/models.md.
    """
    if _ADAPTER_IDS.fullmatch(spec.path):
        raise _adapter_error(spec, f"{spec.path} is a LoRA adapter")


def refuse_adapter(spec: ModelSpec, folder: Path) -> None:
    """Raises UnsupportedModelError for a folder with a LoRA adapter."""
    if (folder / "adapter_config.json").is_file():
        raise _adapter_error(spec, f"{folder} holds a LoRA adapter (adapter_config.json)")


def _adapter_error(spec: ModelSpec, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model {spec.name}: {found}, without audio.q_tokens, which no adapter of "
        "video-SALMONN 2+ holds, so that even merged it would be another model than the one "
        f"published; use a complete checkpoint ({COMPLETE})"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor in a shard: its released name, its shape, and how to read it."""

    released: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def read_weights(
    spec: ModelSpec, folder: Path, shapes: Mapping[str, tuple[int, ...]], optional: frozenset[str]
) -> dict[str, Tensor]:
    """All tensors by the module's names, memory-mapped where the system can.

    `shapes` are the module's; only an `optional` one (a tied head) may be absent. Raises
    UnsupportedModelError for what is missing, unknown, given twice or of another shape.
    """
    stored: dict[str, _Stored] = {}
    with ExitStack() as opened:
        for file in weight_files(spec, folder):
            shard: Any = opened.enter_context(safe_open(folder / file, framework="pt"))
            for name in sorted(set(shard.keys()) - set(_NOT_WEIGHTS)):
                ours = module_name(name)
                if ours in stored:
                    raise UnsupportedModelError(
                        f"model {spec.name}: {name} in {folder / file} comes a second time (as "
                        f"{stored[ours].released}); fetch the checkpoint again into an empty folder"
                    )
                stored[ours] = _Stored(
                    released=name,
                    shape=tuple(shard.get_slice(name).get_shape()),
                    read=partial(shard.get_tensor, name),
                )
        _check(spec, folder, stored, shapes, optional)
        return {name: tensor.read() for name, tensor in stored.items()}


def _check(
    spec: ModelSpec,
    folder: Path,
    stored: Mapping[str, _Stored],
    shapes: Mapping[str, tuple[int, ...]],
    optional: frozenset[str],
) -> None:
    unknown = sorted(stored[name].released for name in set(stored) - set(shapes))
    if unknown and all(name.startswith(_ADAPTER) for name in unknown):
        raise _adapter_error(spec, f"{folder} holds the weights of a LoRA adapter")
    missing = sorted(set(shapes) - set(stored) - optional)
    changed = sorted(
        f"{stored[name].released} {stored[name].shape} for {shapes[name]}"
        for name in set(stored) & set(shapes)
        if stored[name].shape != shapes[name]
    )
    wrong = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}"
        for what, names in (
            ("missing (by the module's name)", missing),
            ("unknown", unknown),
            ("of another shape than config.json says", changed),
        )
        if names
    ]
    if wrong:
        raise UnsupportedModelError(
            f"model {spec.name}: the weights in {folder} are not those of a complete "
            f"video-SALMONN 2+: {'; '.join(wrong)}; fetch the checkpoint again, or use {COMPLETE}"
        )
