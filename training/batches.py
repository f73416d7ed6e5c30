"""Training sequences: one clip (or one set of candidates) and several questions about it.

The questions of a sequence share the media and do not see each other; each has the positions it
would have in a prompt of its own, so that a question in training is exactly a prompt of the test.
Beside tokens and positions, a batch carries the labels of deep supervision: which token should
know what, by which layer (see `HEADS`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration

from avflow.datasets.testbed.questions import (
    N_OPTIONS,
    TASKS,
    Question,
    ask,
    matching_options,
    matching_text,
)
from avflow.datasets.testbed.samples import option_parts
from avflow.datasets.testbed.world import CLIP_SECONDS, N_CLASSES, sample_scene
from training.flow import AUDIO as AUDIO_KIND
from training.flow import FREE, RULES, TEXT, Rule, Tokens, blanked, stage_masks
from training.flow import IMAGE as IMAGE_KIND
from training.flow import VIDEO as VIDEO_KIND
from training.model import MEL_PER_SECOND, SYSTEM, TOKENS_PER_SECOND, VIDEO_TOKENS

CLIP_TASKS = tuple(task.name for task in TASKS if task.layout == "single_video")
MATCHING_TASKS = tuple(task.name for task in TASKS if task.layout == "interleaved")
TASK_NAMES = (*CLIP_TASKS, *MATCHING_TASKS)
NONE = N_CLASSES  # "there is none before", for the tags of a clip's first second

# What a token should know -> (after how many layers, number of answers). The order of the layers
# is the flow that the testbed is built to show: inside the media, media to question, question to
# options, all to the last token.
HEADS: dict[str, tuple[int, int]] = {
    "video_own": (2, N_CLASSES),
    "video_before": (2, N_CLASSES + 1),
    "sound_before": (2, N_CLASSES + 1),
    "audio_own": (2, N_CLASSES),
    "audio_before": (2, N_CLASSES + 1),
    "audio_colour": (2, N_CLASSES),
    "standalone_own": (2, N_CLASSES),
    "candidate_ordinal": (2, N_OPTIONS),
    "anchor_task": (2, len(CLIP_TASKS)),
    "anchor_answer": (4, 2 * N_CLASSES),
    "reference_match": (4, N_OPTIONS),
    "option_answer": (5, 2 * N_CLASSES),
    "option_letter": (6, N_OPTIONS + 1),
}
RULED = 0.6  # share of clips under one of `RULES`
# Without audio to video, `colour_when_sound` has one route left, the one that is meant.
RULE_SHARES = [4.0 if rule.name == "audio_to_video" else 1.0 for rule in RULES]
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


@dataclass(slots=True)
class Row:
    """One sequence under construction; `labels` holds (head, position, distribution)."""

    rule: Rule = FREE
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)  # [3, n] pieces
    labels: list[tuple[str, int, dict[int, float]]] = field(default_factory=list)
    media: list[tuple[str, int, int]] = field(default_factory=list)  # sense, position, bank row
    lasts: list[tuple[int, int, int, bool]] = field(default_factory=list)  # pos, letter, task, full

    def tag(self, head: str, at: Sequence[int], answer: int) -> None:
        """Ask `answer` of `head` at each of the positions `at`, unless the rule forbids."""
        if head in self.rule.tags:
            return
        self.labels.extend((head, position, {answer: 1.0}) for position in at)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of B rows of S tokens; P media items per sense; label triples per head."""

    ids: Tensor  # [B, S]
    positions: Tensor  # [3, B, S]
    masks: tuple[Tensor, ...]  # a stage: bool [B, 1, S, S], True = may attend
    blanked: Tensor  # bool [B, S]: embedded as zeros
    media: dict[str, tuple[Tensor, Tensor, Tensor]]  # sense -> rows, positions, bank rows
    labels: dict[str, tuple[Tensor, Tensor, Tensor]]  # head -> rows, positions, distributions
    lasts: tuple[Tensor, Tensor]  # rows, positions
    letters: Tensor  # token ids of the right letters
    tasks: Tensor  # index into TASK_NAMES
    full: Tensor  # bool: asked about a clip of the test's length


class Composer:
    """Composes batches of random scenes from a bank of per-second features."""

    def __init__(
        self,
        model: Qwen2_5OmniThinkerForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        bank: dict[str, dict[str, Tensor]],
        rng: Random,
    ) -> None:
        self._model, self._rng = model, rng
        self._tokenize = lru_cache(maxsize=None)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )
        self._rope_cache: dict[tuple[object, ...], Tensor] = {}
        self._token = {
            "video": tokenizer.video_token_id,
            "audio": tokenizer.audio_token_id,
            "image": tokenizer.image_token_id,
        }
        self._bank_rows = {
            (sense, bool(standalone), class_): torch.nonzero(
                (items["standalone"] == standalone) & (items["classes"] == class_)
            )
            .flatten()
            .tolist()
            for sense, items in bank.items()
            for standalone in (False, True)
            for class_ in range(N_CLASSES)
        }

    def batch(
        self, n_clips: int, n_matching: int, weights: Sequence[float], asks: int, guided: float
    ) -> Batch:
        """`n_clips` clips with `asks` questions each and `n_matching` sets of candidates.

        `weights`: relative share of each of `CLIP_TASKS` among the questions. `guided`: the share
        of rows under the masks that guide the flow.
        """
        rows = [self._clip_row(weights, asks) for _ in range(n_clips)]
        rows += [self._matching_row(MATCHING_TASKS[i % 2]) for i in range(n_matching)]
        guides = [self._rng.random() < guided for _ in rows]
        return _collate(rows, guides)

    def _item(self, sense: str, standalone: bool, class_: int) -> int:
        return self._rng.choice(self._bank_rows[sense, standalone, class_])

    def _extend(self, row: Row, text: str, block: int, *, late: bool = False) -> range:
        """Append a text's tokens; the positions they take. `late`: after the question."""
        return self._extend_ids(row, self._tokenize(text), block, late=late)

    @staticmethod
    def _extend_ids(
        row: Row, tokens: Sequence[int], block: int, *, kind: int = TEXT, late: bool = False
    ) -> range:
        start, count = len(row.ids), len(tokens)
        row.ids.extend(tokens)
        row.blocks.extend([block] * count)
        row.kinds.extend([kind] * count)
        row.units.extend([len(row.media)] * count)
        row.late.extend([late] * count)
        return range(start, start + count)

    def _media(self, row: Row, kind: str, standalone: bool, class_: int, block: int) -> range:
        """Append one second's (or one standalone item's) tokens of one sense."""
        sense = "sound" if kind == "audio" else "sight"
        count = TOKENS_PER_SECOND if kind == "audio" else VIDEO_TOKENS
        number = {"video": VIDEO_KIND, "audio": AUDIO_KIND, "image": IMAGE_KIND}[kind]
        at = self._extend_ids(row, [self._token[kind]] * count, block, kind=number)
        row.media.append((sense, at.start, self._item(sense, standalone, class_)))
        return at

    def _clip_row(self, weights: Sequence[float], asks: int) -> Row:
        rng = self._rng
        row = Row(rule=rng.choices(RULES, RULE_SHARES)[0] if rng.random() < RULED else FREE)
        allowed = [
            0.0 if task in row.rule.tasks else weight
            for task, weight in zip(CLIP_TASKS, weights, strict=True)
        ]
        seconds = rng.choice((2, 3, 4, CLIP_SECONDS, CLIP_SECONDS, CLIP_SECONDS))
        scene = sample_scene(rng, seconds=seconds)
        self._extend(row, HEAD + "<|vision_bos|><|audio_bos|>", 0)
        colour_before = sound_before = NONE
        for colour, sound in zip(scene.colours, scene.sounds, strict=True):
            at = self._media(row, "video", False, colour, 0)
            row.tag("video_own", at, colour)
            row.tag("video_before", at, colour_before)
            row.tag("sound_before", at, sound_before)
            at = self._media(row, "audio", False, sound, 0)
            row.tag("audio_own", at, sound)
            row.tag("audio_before", at, sound_before)
            row.tag("audio_colour", at, colour)
            colour_before, sound_before = colour, sound
        self._extend(row, "<|audio_eos|><|vision_eos|>", 0)
        prefix = len(row.ids)
        for block in range(1, asks + 1):
            task = rng.choices(CLIP_TASKS, allowed)[0]
            question = ask(task, scene, rng, answer=rng.randrange(N_OPTIONS))
            present = scene.colours if question.asks_colour else scene.sounds
            self._ask_about_clip(row, question, present, block)
            self._place(row, prefix, block, ("clip", seconds, task), seconds)
        return row

    def _ask_about_clip(
        self, row: Row, question: Question, present: tuple[int, ...], block: int
    ) -> None:
        at = self._extend(row, question.text, block)
        anchor = self._tokenize(f" {question.anchor}")[0]
        position = next(p for p in reversed(at) if row.ids[p] == anchor)
        row.tag("anchor_task", [position], CLIP_TASKS.index(question.task))
        right = (
            present if question.task in ("sight", "sound") else (question.options[question.answer],)
        )
        shift = 0 if question.asks_colour else N_CLASSES
        sought = {shift + c: 1 / len(right) for c in right}
        row.labels.append(("anchor_answer", position, sought))
        for part in option_parts(question.option_words):
            at = self._extend(row, part.text, block, late=True)
            if part.role == "option_text":
                is_right = part.index == question.answer
                row.labels.append(("option_answer", at[1], sought))
                row.tag("option_letter", [at[1]], question.answer if is_right else N_OPTIONS)
        at = self._extend(row, TAIL, block, late=True)
        task = TASK_NAMES.index(question.task)
        full = len(present) == CLIP_SECONDS
        row.lasts.append((at[-1], self._letter(question.answer), task, full))

    def _matching_row(self, task: str) -> Row:
        rng, row = self._rng, Row()
        kind, other = ("image", "audio") if task == "match_image" else ("audio", "image")
        classes = rng.sample(range(N_CLASSES), N_OPTIONS)
        self._extend(row, HEAD, 0)
        for ordinal, class_ in enumerate(classes):
            self._extend(row, f"{ordinal + 1}.", 0)
            at = self._standalone(row, kind, class_, 0)
            row.tag("standalone_own", at, class_)
            row.tag("candidate_ordinal", at, ordinal)
        prefix = len(row.ids)
        for block, answer in enumerate(rng.sample(range(N_OPTIONS), N_OPTIONS), start=1):
            self._extend(row, matching_text(task), block)
            at = self._standalone(row, other, classes[answer], block)
            row.tag("standalone_own", at, classes[answer])
            row.tag("reference_match", at, answer)
            for part in option_parts(matching_options(task)):
                self._extend(row, part.text, block, late=True)
            at = self._extend(row, TAIL, block, late=True)
            row.lasts.append((at[-1], self._letter(answer), TASK_NAMES.index(task), True))
            self._place(row, prefix, block, (task,), 1)
        return row

    def _standalone(self, row: Row, kind: str, class_: int, block: int) -> range:
        marks = "audio" if kind == "audio" else "vision"
        self._extend(row, f"<|{marks}_bos|>", block)
        at = self._media(row, kind, True, class_, block)
        self._extend(row, f"<|{marks}_eos|>", block)
        return at

    def _letter(self, answer: int) -> int:
        return self._tokenize("ABCD"[answer])[0]

    def _place(
        self, row: Row, prefix: int, block: int, key: tuple[object, ...], seconds: int
    ) -> None:
        """Append the positions that the model itself gives to prefix and question `block`."""
        if key not in self._rope_cache:
            start = row.blocks.index(block)
            ids = torch.tensor([row.ids[:prefix] + row.ids[start:]])
            self._rope_cache[key] = _rope(self._model, ids, seconds, self._token)
        positions = self._rope_cache[key]
        row.positions.extend([positions] if block == 1 else [positions[:, prefix:]])


def _rope(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    ids: Tensor,
    seconds: int,
    token: dict[str, int],
) -> Tensor:
    """mRoPE positions [3, S] of one prompt [1, S] whose audio pieces last `seconds` each."""
    n_images = int((ids == token["image"]).sum()) // VIDEO_TOKENS
    n_audios = int((ids == token["audio"]).sum()) // (TOKENS_PER_SECOND * seconds)
    is_clip = bool((ids == token["video"]).any())
    positions, _ = model.get_rope_index(
        ids,
        torch.tensor([[1, 4, 4]] * n_images) if n_images else None,
        torch.tensor([[seconds, 4, 4]]) if is_clip else None,
        torch.ones_like(ids),
        is_clip,
        torch.tensor([MEL_PER_SECOND * seconds] * n_audios),
        torch.tensor([1.0]) if is_clip else None,
    )
    return positions[:, 0]


def _collate(rows: list[Row], guides: list[bool]) -> Batch:
    length = max(len(row.ids) for row in rows)

    def padded(lists: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([list_ + [filler] * (length - len(list_)) for list_ in lists])

    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        positions[:, index, : len(row.ids)] = torch.cat(row.positions, 1)
    tokens = Tokens(
        blocks=padded([row.blocks for row in rows], -1),
        kinds=padded([row.kinds for row in rows], TEXT),
        units=padded([row.units for row in rows], 0),
        late=padded([[int(x) for x in row.late] for row in rows], 0).bool(),
    )
    rules = [row.rule for row in rows]
    lasts = [(i, *last) for i, row in enumerate(rows) for last in row.lasts]
    return Batch(
        ids=padded([row.ids for row in rows], 0),
        positions=positions,
        masks=stage_masks(tokens, rules, torch.tensor(guides)),
        blanked=blanked(tokens, rules),
        media={sense: _media_index(rows, sense) for sense in ("sight", "sound")},
        labels={head: _label_index(rows, head) for head in HEADS},
        lasts=(torch.tensor([x[0] for x in lasts]), torch.tensor([x[1] for x in lasts])),
        letters=torch.tensor([x[2] for x in lasts]),
        tasks=torch.tensor([x[3] for x in lasts]),
        full=torch.tensor([x[4] for x in lasts]),
    )


def _media_index(rows: list[Row], sense: str) -> tuple[Tensor, Tensor, Tensor]:
    count = TOKENS_PER_SECOND if sense == "sound" else VIDEO_TOKENS
    items = [(i, at, item) for i, row in enumerate(rows) for s, at, item in row.media if s == sense]
    which, at, item = torch.tensor(items).T
    return which[:, None].expand(-1, count), at[:, None] + torch.arange(count), item


def _label_index(rows: list[Row], head: str) -> tuple[Tensor, Tensor, Tensor]:
    found = [(i, at, p) for i, row in enumerate(rows) for name, at, p in row.labels if name == head]
    targets = torch.zeros(len(found), HEADS[head][1])
    for index, (_, _, distribution) in enumerate(found):
        for answer, probability in distribution.items():
            targets[index, answer] = probability
    which = torch.tensor([x[0] for x in found], dtype=torch.long)
    return which, torch.tensor([x[1] for x in found], dtype=torch.long), targets
