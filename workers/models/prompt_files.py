"""The files beside a checkpoint's weights without which no prompt can be made for it.

Libraries don't always miss them: from a folder without vocabulary transformers builds a tokenizer
that drops every word in silence.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from avflow.workers.models.base import ModelSpec, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A part of a checkpoint: all files of one of the `either`, as one release or another has
    them."""

    what: str
    either: tuple[tuple[str, ...], ...]


TOKENIZER = Needed(what="tokenizer", either=(("tokenizer.json",), ("vocab.json", "merges.txt")))
TOKENIZER_CONFIG = Needed(what="tokenizer's settings", either=(("tokenizer_config.json",),))
PROCESSOR = Needed(
    what="processor", either=(("preprocessor_config.json",), ("processor_config.json",))
)
CHAT_TEMPLATE = Needed(
    what="chat template", either=(("chat_template.jinja",), ("chat_template.json",))
)


def refuse_missing(
    spec: ModelSpec, where: str, names: Collection[str], needed: Sequence[Needed]
) -> None:
    """Raises UnsupportedModelError that names what is `needed` and not among the files `names`."""
    lacking = [part for part in needed if not any(set(names).issuperset(e) for e in part.either)]
    if lacking:
        listed = "; ".join(
            f"{part.what}: no {', no '.join(' and '.join(files) for files in part.either)}"
            for part in lacking
        )
        raise UnsupportedModelError(
            f"model {spec.name}: {where} lacks files without which no prompt can be made: "
            f"{listed}; fetch them from where its weights are from"
        )
