"""video-SALMONN 2+: how sound is woven into a video, and position ids under two rules.

`train` is what the checkpoints were trained with (the authors' `get_rope_index_25`). `generate` is
what their released `generate()` really does: it drops the lengths of the sound and the seconds a
frame pair, so that the first tokens of the block, pictures or sound alike, get a picture's raster,
two steps a frame pair, and all that follow count on as text. Both are recorded from their code.

Shapes: t frame pairs, h x w patches each, A audio tokens, N prompt tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PositionRule = Literal["generate", "train"]
TOKENS_PER_SECOND = 2  # of sound; the steps of the clock, too: hard-coded by the authors
BLOCK_S = 30  # what Whisper hears at once
TOKENS_PER_BLOCK = BLOCK_S * TOKENS_PER_SECOND
_UNTIMED_STEP = 2  # one second a frame pair, when none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A prompt's one run of media tokens, `start` its first position.

    `grid` (t, h, w) in patches of which `merge` x `merge` make a token, or None without pictures;
    `seconds` a frame pair lasts; `n_audio` tokens of sound, 0 without.
    """

    start: int
    grid: tuple[int, int, int] | None
    seconds: float
    n_audio: int
    merge: int = 2

    @property
    def row_tokens(self) -> int:
        """Visual tokens of a frame pair."""
        return 0 if self.grid is None else self.grid[1] * self.grid[2] // self.merge**2


def frame_steps(n_pairs: int, seconds: float) -> Tensor:
    """int64 [t]: each frame pair's time in half seconds, cut off, in float32 as the authors do."""
    return (torch.arange(n_pairs) * seconds * TOKENS_PER_SECOND).long()


def sounds_after(n_pairs: int, seconds: float, n_audio: int) -> list[int]:
    """How many audio tokens follow each frame pair: those it overlaps, the last all the rest.

    Raises ValueError where the last frame pair begins after the sound has ended.
    """
    steps = frame_steps(n_pairs, seconds).tolist()
    if steps[-1] > n_audio:
        raise ValueError(f"{n_audio} audio tokens end before the last frame at {steps[-1]}")
    ends = [*steps[1:], n_audio]
    return [end - start for start, end in zip(steps, ends, strict=True)]


def is_sound(block: Block) -> Tensor:
    """bool [tokens of the block]: which of them are sound."""
    if block.grid is None:
        return torch.ones(block.n_audio, dtype=torch.bool)
    pairs = block.grid[0]
    if not block.n_audio:
        return torch.zeros(pairs * block.row_tokens, dtype=torch.bool)
    after = torch.tensor(sounds_after(pairs, block.seconds, block.n_audio))
    lengths = torch.stack([torch.full_like(after, block.row_tokens), after], dim=1).flatten()
    return torch.tensor([False, True]).repeat(pairs).repeat_interleave(lengths)


def position_ids(block: Block, n_tokens: int, rule: PositionRule) -> Tensor:
    """int64 [3, 1, N]: time, height, width of every token of a prompt with one block of media."""
    positions = torch.arange(n_tokens).repeat(3, 1)
    inside = _trained(block) if rule == "train" else _generated(block)
    stop = block.start + inside.shape[1]
    positions[:, block.start : stop] = inside + block.start
    # Trained with sound, the text goes on from the clock alone, however large the picture is.
    clock = inside[0] if rule == "train" and block.n_audio else inside
    rest = torch.arange(n_tokens - stop) + int(clock.max()) + 1
    positions[:, stop:] = rest + block.start
    return positions[:, None]


def _raster(block: Block, steps: Tensor) -> Tensor:
    """int64 [3, visual tokens]: a frame pair's time, then its rows and columns."""
    assert block.grid is not None
    height, width = block.grid[1] // block.merge, block.grid[2] // block.merge
    axes = torch.meshgrid(steps, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes).flatten(1)


def _trained(block: Block) -> Tensor:
    """From the block's start: pictures by the clock; sound by the clock and along one other axis,
    the width beside pictures and the height without."""
    sound = torch.arange(block.n_audio)
    still = torch.zeros_like(sound)
    if block.grid is None:
        return torch.stack([sound, sound, still])
    seen = _raster(block, frame_steps(block.grid[0], block.seconds))
    where = is_sound(block)
    inside = torch.empty(3, len(where), dtype=torch.int64)
    inside[:, where] = torch.stack([sound, still, sound])
    inside[:, ~where] = seen
    return inside


def _generated(block: Block) -> Tensor:
    """From the block's start: the raster, by order in the prompt; then text to the block's end."""
    if block.grid is None:
        return torch.arange(block.n_audio).repeat(3, 1)
    seen = _raster(block, torch.arange(block.grid[0]) * _UNTIMED_STEP)
    rest = torch.arange(block.n_audio) + int(seen.max()) + 1
    return torch.cat([seen, rest.repeat(3, 1)], dim=1)
