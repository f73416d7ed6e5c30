"""The checkpoints that the paper's sweep and its kin use, as published, and what they need.

None of them has been at hand. Shapes are those of their config.json as public copies and accounts
of it have them; parameters follow from the shapes (a test builds each) and are what is loaded here,
of Qwen2.5-Omni the Thinker without its talker. One count has been met by files: a published
fine-tune of the 7B holds its Thinker alone, in 17,863,627,776 bytes of bfloat16, two a parameter.
Licences, without having read a card of video-SALMONN 2+: Qwen2.5-Omni-7B's is that of a public
copy's card; of the 3B, its LICENSE file is as long as that of other 3B models of Qwen, whose cards
name the Qwen Research licence; of video-SALMONN 2+, what the authors' code is under, and what the
Qwen2.5-VL of that size is under.
"""

from dataclasses import dataclass

from avflow.workers.models.base import ModelInfo
from avflow.workers.models.room import longest_prompt, needed_on_each

# The paper's largest input: 128 frames at 2 a second are 64 frame pairs of 144 tokens and 64 s of
# sound at 25 tokens a second.
PAPER_TOKENS = longest_prompt(2.0, 128, 144)
BYTE_BUDGET = 2**31  # a sweep's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A checkpoint on the hub. `info.digest` is empty: it is known only of files. `licence`: see
    above; where the model it is built on has another, that too."""

    checkpoint: str
    family: str
    info: ModelInfo
    licence: str


def _info(  # noqa: PLR0917 (a row of a table)
    n_layers: int,
    hidden_size: int,
    heads: tuple[int, int],
    intermediate_size: int,
    vocab_size: int,
    parameters: int,
) -> ModelInfo:
    """`heads` of queries, of keys and values; heads of 128, as all of these have."""
    return ModelInfo(
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_size=128,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        parameters=parameters,
        digest="",
    )


PUBLISHED: tuple[Published, ...] = (
    Published(
        checkpoint="Qwen/Qwen2.5-Omni-3B",
        family="qwen2_5_omni",
        info=_info(36, 2048, (16, 2), 11008, 151936, 4_703_464_448),
        licence="Qwen Research",
    ),
    Published(
        checkpoint="Qwen/Qwen2.5-Omni-7B",
        family="qwen2_5_omni",
        info=_info(28, 3584, (28, 4), 18944, 152064, 8_931_813_888),
        licence="Apache-2.0",
    ),
    Published(
        checkpoint="tsinghua-ee/video-SALMONN2_plus_3B_full",
        family="video_salmonn2",
        info=_info(36, 2048, (16, 2), 11008, 151936, 4_677_981_184),
        licence="Apache-2.0 and Qwen Research",
    ),
    Published(
        checkpoint="tsinghua-ee/video-SALMONN2_plus_7B_full",
        family="video_salmonn2",
        info=_info(28, 3584, (28, 4), 18944, 152064, 9_220_244_992),
        licence="Apache-2.0",
    ),
    Published(
        checkpoint="tsinghua-ee/video-SALMONN2_plus_72B_full",
        family="video_salmonn2",
        info=_info(80, 8192, (64, 8), 29568, 152064, 74_353_016_064),
        licence="Apache-2.0 and Qwen",
    ),
)


def needed_bytes(info: ModelInfo, dtype: str, n_tokens: int = PAPER_TOKENS) -> int:
    """What a sample of so many tokens takes at its peak, weights included."""
    return needed_on_each(info, dtype, n_tokens, BYTE_BUDGET)
