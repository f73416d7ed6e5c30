"""From parts to labelled tokens, with a real byte-level tokenizer and templates that misbehave."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import LETTERS, MediaPart, Part, Sample, TextPart
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.workers.models.prompting import (
    Label,
    Prompt,
    Render,
    expand,
    layout_of,
    owners,
    render_prompt,
)

CLIP = MediaPart(kind="video", path="clip.mp4")
PLACEHOLDERS = {"video": "<|VIDEO|>", "image": "<|IMAGE|>", "audio": "<|AUDIO|>"}
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from avflow.workers.models.tiny import build_tokenizer

    return build_tokenizer(
        ["Which colour is shown? The best answer is:", "A. red\nB. green\n(A) An"]
    )


def sample_of(*parts: Part, interleaved: bool = False) -> Sample:
    return Sample(
        sample_id="s1",
        dataset="d",
        task="t",
        category="c",
        layout="interleaved" if interleaved else "single_video",
        parts=parts,
        answer=0,
        media_group="g",
    )


def chat(sample: Sample, *, change: str = "") -> Render:
    """A chat template as a function; `change` makes it do what real ones have been seen to do."""

    def render(texts: Sequence[str]) -> str:
        words = iter(texts)
        turn = [
            f"<|vision_bos|>{PLACEHOLDERS[part.kind]}<|vision_eos|>"
            if isinstance(part, MediaPart)
            else next(words).strip()
            if change == "strips"
            else next(words)
            for part in sample.parts
        ]
        if change == "media last":
            turn.sort(key=lambda text: "<|vision_bos|>" in text)
        if change == "repeats":
            turn *= 2
        if change == "no media":
            turn = [text for text in turn if "<|vision_bos|>" not in text]
        return SYSTEM + "".join(turn) + END

    return render


def prompt_of(sample: Sample, tokenizer: Any, change: str = "") -> Prompt:
    return render_prompt(
        sample, chat(sample, change=change), PLACEHOLDERS, sorted(tokenizer.get_added_vocab())
    )


def lay_out(sample: Sample, tokenizer: Any) -> tuple[Layout, Prompt, list[tuple[int, int]]]:
    """The whole way, three frames of two tokens for a clip and two tokens for any other medium."""
    prompt = prompt_of(sample, tokenizer)
    counts = [6 if part.role == "clip" else 2 for part in sample.media]
    words = [PLACEHOLDERS[part.kind] * n for part, n in zip(sample.media, counts, strict=True)]
    expanded = expand(prompt, words)
    coded = tokenizer(expanded.text, return_offsets_mapping=True)
    labels: dict[int, list[Label]] = {}
    for number, part in enumerate(sample.parts):
        if isinstance(part, MediaPart):
            labels[number] = (
                [("frame", i // 2) for i in range(6)]
                if part.role == "clip"
                else [(part.role, part.index)] * 2
            )
    markers = tokenizer.convert_tokens_to_ids(["<|vision_bos|>", "<|vision_eos|>"])
    layout = layout_of(
        expanded, coded["offset_mapping"], labels, [t in markers for t in coded["input_ids"]]
    )
    return layout, expanded, coded["offset_mapping"]


def words_of(
    layout: Layout, prompt: Prompt, offsets: list[tuple[int, int]], kind: str
) -> list[str]:
    """The characters of each segment of a kind."""
    return [
        prompt.text[offsets[s.start][0] : offsets[s.stop - 1][1]]
        for s in layout.segments
        if s.kind == kind
    ]


def test_every_group_holds_the_words_it_was_written_with(tokenizer: Any) -> None:
    sample = sample_of(
        CLIP,
        *multiple_choice(
            "Which colour?\n", ["red", "green"], heading="Options:\n", closing="Answer:"
        ),
    )
    layout, prompt, offsets = lay_out(sample, tokenizer)

    def words(kind: str) -> list[str]:
        return words_of(layout, prompt, offsets, kind)

    assert words("system") == [SYSTEM]
    assert words("frame") == ["<|VIDEO|><|VIDEO|>"] * 3
    assert words("non_option_question") == ["Which colour?\n"]
    assert words("option_letter") == ["A", "B"]
    assert words("option_text") == [". red\n", ". green\n"]
    assert words("template") == [
        "<|vision_bos|>",
        "<|vision_eos|>",
        "Options:\n",
        "Answer:<|im_end|>\n<|im_start|>assistant",
    ]
    assert words("last") == ["\n"]
    question = group_positions(layout, "question")
    last_frame = list(layout.of("frame"))[-1]
    assert list(question) == list(range(last_frame.stop, layout.n_tokens - 1))


def test_a_question_that_quotes_its_options_changes_nothing(tokenizer: Any) -> None:
    quoting = "Is it\nA. red\nB. green\nor A?\n"
    sample = sample_of(CLIP, *multiple_choice(quoting, ["red", "green"]))
    layout, prompt, offsets = lay_out(sample, tokenizer)
    assert words_of(layout, prompt, offsets, "non_option_question") == [quoting]
    letters = list(layout.of("option_letter"))
    assert len(letters) == 2
    start, stop = prompt.spans[2]
    assert offsets[letters[0].start] == (start, stop)


def test_interleaved_media_get_their_roles(tokenizer: Any) -> None:
    sample = sample_of(
        TextPart(role="other", text="1."),
        MediaPart(kind="image", path="a", role="candidate", index=0),
        TextPart(role="other", text="2."),
        MediaPart(kind="image", path="b", role="candidate", index=1),
        TextPart(role="question", text="Which?\n"),
        MediaPart(kind="audio", path="c", role="reference"),
        *multiple_choice("?", ["one", "two"])[1:],
        interleaved=True,
    )
    layout, prompt, offsets = lay_out(sample, tokenizer)
    assert [s.name for s in layout.of("candidate", "reference")] == [
        "candidate:0",
        "candidate:1",
        "reference",
    ]
    assert words_of(layout, prompt, offsets, "system") == [SYSTEM]
    assert words_of(layout, prompt, offsets, "template")[:2] == [
        "1.<|vision_bos|>",
        "<|vision_eos|>2.<|vision_bos|>",
    ]


TEXT = st.text(st.sampled_from("ab Zé字🙂 \n.,:?1A'()\t"), max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, heading=TEXT, options=st.lists(TEXT, min_size=1, max_size=5), closing=TEXT)
def test_any_text_is_located_or_refused(
    tokenizer: Any, question: str, heading: str, options: list[str], closing: str
) -> None:
    parts = multiple_choice(question, options, heading=heading, closing=closing)
    try:
        layout, prompt, offsets = lay_out(sample_of(CLIP, *parts), tokenizer)
    except LayoutError:
        # Only a letter that its neighbour swallows may be refused, or a text lost to a neighbour.
        before = (heading or question)[-1:]
        assert not before.isspace() or any(not o.strip() for o in options) or not question.strip()
        return
    assert words_of(layout, prompt, offsets, "option_letter") == [
        w for w in words_of(layout, prompt, offsets, "option_letter") if w.strip() in LETTERS
    ]
    owner = owners(prompt, offsets)
    for number, part in enumerate(prompt.sample.parts):
        mine = [offsets[t] for t, n in enumerate(owner) if n == number]
        if isinstance(part, TextPart) and part.text.strip():
            # All words of the part, and no word of another.
            found = "".join(prompt.text[a:b] for a, b in sorted(set(mine)))
            inside = prompt.text[mine[0][0] : mine[-1][1]].strip()
            assert inside == found.strip()
            assert inside.startswith(part.text.strip()[:1])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT.filter(str.strip), options=st.lists(TEXT, min_size=1, max_size=5))
def test_options_on_lines_of_their_own_are_always_located(
    tokenizer: Any, question: str, options: list[str]
) -> None:
    clean = [option.strip() + "." for option in options]
    sample = sample_of(CLIP, *multiple_choice(question.strip() + "\n", clean, closing="So:"))
    layout, prompt, offsets = lay_out(sample, tokenizer)
    assert words_of(layout, prompt, offsets, "option_letter") == list(LETTERS[: len(clean)])
    assert words_of(layout, prompt, offsets, "option_text") == [f". {o}\n" for o in clean]


@pytest.mark.parametrize(("before", "after"), [("Which?\n", "n apple\n"), ("(", ") red\n")])
def test_a_letter_that_is_part_of_a_longer_token_is_refused(
    tokenizer: Any, before: str, after: str
) -> None:
    sample = sample_of(
        CLIP,
        TextPart(role="question", text=before),
        TextPart(role="option_letter", text="A", index=0),
        TextPart(role="option_text", text=after, index=0),
    )
    with pytest.raises(LayoutError, match="option_letter 0 'A' is tokenised as"):
        lay_out(sample, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strips", "changes the texts"),
        ("repeats", "drops, repeats or reorders"),
        ("media last", "no video placeholder|of no medium"),
        ("no media", "no video placeholder"),
    ],
)
def test_templates_that_rewrite_the_turn_are_refused(
    tokenizer: Any, change: str, message: str
) -> None:
    sample = sample_of(CLIP, *multiple_choice("Which?\n", ["red"]))
    with pytest.raises(LayoutError, match=message):
        prompt_of(sample, tokenizer, change)


@pytest.mark.parametrize("word", ["<|VIDEO|>", "<|im_end|>", "\ue0a0"])
def test_data_may_not_write_control_tokens(tokenizer: Any, word: str) -> None:
    sample = sample_of(CLIP, *multiple_choice(f"Which {word}?\n", ["red"]))
    with pytest.raises(LayoutError, match="control token"):
        prompt_of(sample, tokenizer)


def test_a_prompt_without_media_or_an_option_without_index_is_refused(tokenizer: Any) -> None:
    with pytest.raises(LayoutError, match="needs a media file"):
        lay_out(sample_of(*multiple_choice("Which?\n", ["red"])), tokenizer)
    sample = sample_of(CLIP, TextPart(role="option_letter", text="A"))
    with pytest.raises(LayoutError, match="has no index"):
        lay_out(sample, tokenizer)


def test_multiple_choice_wants_a_sensible_number_of_options() -> None:
    with pytest.raises(ValueError, match="0 options"):
        multiple_choice("Which?\n", [])
    with pytest.raises(ValueError, match="11 options"):
        multiple_choice("Which?\n", ["x"] * 11)
