"""What adapters ask of a config.json: sizes, keys they can't do without, values they know."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avflow.workers.models.base import ModelInfo, ModelSpec, UnsupportedModelError

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size")  # fmt: skip
# Of a decoder such as the engine runs, whatever the family.
TEXT_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "attention_dropout": (None, 0, 0.0),
}


def config_json(folder: Path) -> dict[str, Any]:
    """What `checkpoint.read_config` has checked, read again from a folder it gave."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def refuse_faults(spec: ModelSpec, faults: list[str]) -> None:
    """Raises UnsupportedModelError that lists all of them, if there are any."""
    if faults:
        raise UnsupportedModelError(
            f"model {spec.name}: its config.json holds what the family {spec.family} can't run: "
            + "; ".join(faults)
        )


def unknown_values(
    config: Mapping[str, Any], known: Mapping[str, Mapping[str, tuple[object, ...]]]
) -> Iterator[str]:
    """`known`: by part ("" or "audio_config.qformer_config") and key, the values that are run."""
    for where, values in known.items():
        found = part_of(config, where)
        for key, runnable in values.items():
            if key in found and found[key] not in runnable:
                yield f"{_at(where)}{key}={found[key]!r} (known: {', '.join(map(repr, runnable))})"


def missing_keys(config: Mapping[str, Any], needed: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """`needed`: by part, the keys that must be there; SIZES must be whole numbers, too."""
    for where, keys in needed.items():
        found = part_of(config, where)
        for key in keys:
            if key not in found:
                yield f"{_at(where)}{key} is missing"
            elif key in SIZES and not (type(found[key]) is int and found[key] > 0):
                yield f"{_at(where)}{key}={found[key]!r} (known: whole numbers above 0)"


def unknown_rope(text: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A scaled rotary embedding: its numbers nobody has compared."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        yield f"{_at(where)}rope_type={kind!r} (known: 'default')"


def model_info(text: Mapping[str, Any], model: Any, digest: str) -> ModelInfo:
    """Sizes of the text decoder's config, parameters of the (empty) model."""
    heads = text["num_attention_heads"]
    return ModelInfo(
        n_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        n_heads=heads,
        n_kv_heads=text["num_key_value_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        digest=digest,
    )


def part_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A part of a config; empty where there is none."""
    part: Any = config
    for key in where.split(".") if where else ():
        part = part.get(key) if isinstance(part, Mapping) else None
    return dict(part) if isinstance(part, Mapping) else {}


def _at(where: str) -> str:
    return f"{where}." if where else ""
