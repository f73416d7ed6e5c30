"""Which way information may go during training, so that it goes there afterwards.

The decoder's layers are three stages. In *guided* rows each stage has its hops and no other:

- the first two layers: between the seconds of a clip (and from text to anything later);
- the next two: from the media to the question, or from the candidates to the reference;
- the rest: no more reading of the media; options read the question, the last token reads options.

The other rows, and every prompt after training, have the plain causal mask: the model has then no
use for a second route. Besides, a row may be under a `Rule` that blocks one hop inside the media in
all layers, or blanks one sense, and asks only what does not need it: tasks learn not to depend on
what they do not need.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, VIDEO, AUDIO, IMAGE = range(4)
STAGE_OF_LAYER = (0, 0, 1, 1, 2, 2, 2, 2)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a row does without: tasks it can't ask then, and tags that its tokens can't know."""

    name: str
    tasks: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


FREE = Rule("free")
RULES = (
    Rule("cross_frame", ("colour_after_colour",), ("video_before",)),
    Rule("cross_audio", ("sound_after_sound",), ("audio_before",)),
    Rule("video_to_audio", ("colour_when_sound", "sound_when_colour"), ("audio_colour",)),
    Rule("audio_to_video", ("colour_after_sound",), ("sound_before",)),
    Rule(
        "no_audio",
        (
            "sound",
            "colour_when_sound",
            "sound_when_colour",
            "sound_after_sound",
            "colour_after_sound",
        ),
        ("audio_own", "audio_before", "audio_colour", "sound_before"),
    ),
    Rule(
        "no_video",
        (
            "sight",
            "colour_when_sound",
            "sound_when_colour",
            "colour_after_colour",
            "colour_after_sound",
        ),
        ("video_own", "video_before", "sound_before", "audio_colour"),
    ),
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the masks are made of: B rows of S tokens.

    `blocks`: 0 the shared media, 1.. the questions, -1 padding. `kinds`: `TEXT` .. `IMAGE`.
    `units`: the number of the second or item a media token belongs to. `late`: after the question.
    """

    blocks: Tensor
    kinds: Tensor
    units: Tensor
    late: Tensor


def stage_masks(tokens: Tokens, rules: list[Rule], guided: Tensor) -> tuple[Tensor, ...]:
    """One bool mask [B, 1, S, S] a stage, True = may attend. `guided`: bool [B]."""
    query, key = tokens.blocks[:, :, None], tokens.blocks[:, None, :]
    length = query.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = ((query == key) | (key == 0)) & causal & ~_rule_blocks(tokens, rules)
    media = (tokens.kinds != TEXT) & (tokens.blocks == 0)
    to_media = media[:, None, :] & guided[:, None, None]
    asking = (tokens.blocks > 0)[:, :, None]
    late = (tokens.late & (tokens.blocks > 0))[:, :, None]
    elsewhere = media[:, :, None] & (tokens.units[:, :, None] != tokens.units[:, None, :])
    first = allowed & ~(to_media & asking)
    second = allowed & ~(to_media & (late | elsewhere))
    third = allowed & ~(to_media & (asking | elsewhere))
    return first[:, None], second[:, None], third[:, None]


def _rule_blocks(tokens: Tokens, rules: list[Rule]) -> Tensor:
    """bool [B, S, S]: the pairs that each row's rule blocks."""
    length = tokens.kinds.shape[1]
    blocked = torch.zeros(len(rules), length, length, dtype=torch.bool)
    for row, rule in enumerate(rules):
        video, audio = tokens.kinds[row] == VIDEO, tokens.kinds[row] == AUDIO
        apart = tokens.units[row][:, None] != tokens.units[row][None, :]
        match rule.name:
            case "cross_frame":
                blocked[row] = video[:, None] & video[None, :] & apart
            case "cross_audio":
                blocked[row] = audio[:, None] & audio[None, :] & apart
            case "video_to_audio":
                blocked[row] = audio[:, None] & video[None, :]
            case "audio_to_video":
                blocked[row] = video[:, None] & audio[None, :]
    return blocked


def blanked(tokens: Tokens, rules: list[Rule]) -> Tensor:
    """bool [B, S]: the tokens whose sense is blanked in their row."""
    kinds = {"no_audio": AUDIO, "no_video": VIDEO}
    without = torch.tensor([kinds.get(rule.name, -1) for rule in rules])
    return tokens.kinds == without[:, None]
