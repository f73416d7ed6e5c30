"""The four steps that give a matching question its order label, on prompts of our own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avflow.datasets.matching import Matching, candidate_of, parse_matching
from avflow.datasets.reading import RowError
from avflow.datasets.sample import MediaPart, TextPart
from avflow.datasets.selections import CQR, QRC, RCQ, RQC

C, A = "[img1][img2][img3][img4]", "[audio1]"


def parse(text: str) -> Matching:
    return parse_matching(text, lambda kind, number: f"{kind}-{number}")


def question_of(matching: Matching) -> str:
    (text,) = [p.text for p in matching.parts if isinstance(p, TextPart) and p.role == "question"]
    return text


@pytest.mark.parametrize(
    ("text", "ordering", "question"),
    [
        # The reference comes last: the text right before it, however long the others are.
        (f"Which of the many things that can be seen in {C} makes the sound {A}?", CQR,
         " makes the sound "),
        (f"{C} made {A}? Say which one of all these it was, please.", CQR, " made "),
        (f"Look at [img1], [img2], [img3] and [img4]. Which fits {A}?", CQR, ". Which fits "),
        # ... unless there is none: then the longest.
        (f"Which of these has made it? {C} {A}", "question-candidates-reference",
         "Which of these has made it? "),
        # The candidates come last: the longest by words.
        (f"Of all these, which one do you think makes the sound {A} best? {C}.", QRC,
         "Of all these, which one do you think makes the sound "),
        (f"Hearing {A}, which of the following do you think it is? {C}", RQC,
         ", which of the following do you think it is? "),
        (f"Given {A} look at {C} and say which of them has made that sound.", RCQ,
         " and say which of them has made that sound."),
        # A tie by spaces (the comma alone would be a word), decided by words.
        (f"By {A} , which one of these shown in {C} is the most likely to be it?", RCQ,
         " is the most likely to be it?"),
        # A true tie goes to the first.
        (f"one two {A} three four {C} five six", QRC, "one two "),
        # Blanks and capitals in placeholders, brackets around candidates.
        ("See ([ IMG1 ], [Img 2], [img3] , [img4]) that best goes with [Audio1]", CQR,
         ") that best goes with "),
    ],
)  # fmt: skip
def test_the_label_and_the_question(text: str, ordering: str, question: str) -> None:
    matching = parse(text)
    assert matching.ordering == ordering
    assert question_of(matching) == question
    assert matching.direction == "audio_to_image"
    other_way = text
    for one, other in (("img", "#"), ("audio", "img"), ("#", "audio"), ("IMG", "audio"),
                       ("Img", "audio"), ("Audio", "img")):  # fmt: skip
        other_way = other_way.replace(f"[{one}", f"[{other}").replace(f"[ {one}", f"[ {other}")
    assert parse(other_way).direction == "image_to_audio"
    assert parse(other_way).ordering == ordering


def test_text_between_candidates_belongs_to_no_group() -> None:
    parts = parse(f"Is it [img1], or [img2]; or [img3][img4] that makes {A}?").parts
    assert [p.role if isinstance(p, TextPart) else (p.role, p.index, p.path) for p in parts] == [
        "other",
        ("candidate", 0, "image-1"),
        "other",
        ("candidate", 1, "image-2"),
        "other",
        ("candidate", 2, "image-3"),
        ("candidate", 3, "image-4"),
        "question",
        ("reference", None, "audio-1"),
        "other",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No media at all", "its media are none"),
        ("One [img1] and one [audio1]", "its media are 1 image, 1 audio"),
        (f"{C} but nothing else", "its media are 4 image"),
        (f"{C} and [audio1][audio2]", "its media are 4 image, 2 audio"),
        (f"{C} {A} and [video1]", "its media are 4 image, 1 audio, 1 video"),
        ("[img1][img3][img2][img4] like [audio1]", "numbers its candidates [1, 3, 2, 4]"),
        ("[img1][img2][img2][img4] like [audio1]", "numbers its candidates [1, 2, 2, 4]"),
        (f"{C} like [audio2]", "numbers its one reference 2, not 1"),
        (f"[img1][img2] like {A} or [img3][img4]", "its reference between two candidates"),
        (f"{C} like {A} [pause]", "question holds '[pause]', which is no placeholder"),
        (f"{C} like {A} [img", "question holds '[img', which is no placeholder"),
        (f"{C} -> {A}?", "question has no words beside its media"),
    ],
)
def test_what_is_no_matching_question_says_why(text: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("option", "number"),
    [("the first image", 0), ("Second image.", 1), ("the third of the images", 2), ("fourth", 3)],
)
def test_an_option_names_a_candidate(option: str, number: int) -> None:
    assert candidate_of(option, "image", 4) == number


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("the fifth image", "and there are 4 candidates"),
        ("the last image", "does not name one candidate by its ordinal"),
        ("the first or the second image", "does not name one candidate by its ordinal"),
        ("the second audio", "and the candidates are of kind image"),
        ("", "does not name one candidate by its ordinal"),
    ],
)
def test_an_option_that_names_none_says_why(option: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        candidate_of(option, "image", 4)
    assert str(caught.value) == f"options hold {option!r}, {reason}" or reason in str(caught.value)


WORDS = st.text(alphabet="abc ,.?", max_size=20)


@given(before=WORDS, middle=WORDS, after=WORDS, joins=st.tuples(WORDS, WORDS), first=st.booleans())
def test_no_text_is_lost_and_one_part_is_the_question(
    before: str, middle: str, after: str, joins: tuple[str, str], first: bool
) -> None:
    candidates = f"[img1]{joins[0]}[img2]{joins[1]}[img3]"
    one, other = (A, candidates) if first else (candidates, A)
    text = before + one + middle + other + after
    if not any(c.isalpha() for c in before + middle + after):
        with pytest.raises(RowError):
            parse(text)
        return
    matching = parse(text)
    names = {"image": "img", "audio": "audio"}
    again = "".join(
        f"[{names[p.kind]}{(p.index or 0) + 1}]" if isinstance(p, MediaPart) else p.text
        for p in matching.parts
    )
    assert again == text
    order = matching.ordering.split("-")
    assert sorted(order) == ["candidates", "question", "reference"]
    assert (order.index("reference") < order.index("candidates")) is first
    assert question_of(matching) in (before, middle, after)
