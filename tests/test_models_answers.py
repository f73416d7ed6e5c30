"""In which form a model answers, and when its own top-1 contradicts that."""

from dataclasses import replace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import Sample
from avflow.pathways.layout import LayoutError
from avflow.workers.models.answers import answer_lead, other_form
from avflow.workers.models.prompting import Prompt, option_tokens

WORDS = ["ASSISTANT", ":", "A", "B", "ĠA", "ĠB", "Ċ", "Ġ", "C", "D"]


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that keeps a space with the word after it, as byte-level ones do."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=":"))
    split = pre_tokenizers.Split(Regex(r" ?[A-Z]+|:|\n| "), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("rendered", "lead"),
    [("ASSISTANT:", " "), ("ASSISTANT\n", ""), ("ASSISTANT: ", ""), ("", "")],
)
def test_the_form_of_an_answer_follows_the_templates_end(rendered: str, lead: str) -> None:
    assert answer_lead(tokenizer_of(WORDS), rendered) == lead


def test_without_a_token_for_the_spaced_letter_the_bare_one_is_the_answer() -> None:
    without = [word for word in WORDS if word not in ("ĠA", "ĠB")]
    tokenizer = tokenizer_of(without)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Z]+|:|\n| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert answer_lead(tokenizer, "ASSISTANT:") == ""


def test_option_tokens_are_in_that_form() -> None:
    sample = Sample(
        sample_id="s", dataset="d", task="t", category="c", layout="single_video",
        parts=multiple_choice("Q?", ["x", "y"]), answer=0, media_group="g",
    )  # fmt: skip
    tokenizer = tokenizer_of(WORDS)
    prompt = Prompt(sample=sample, text="ASSISTANT:", spans=())
    ids = {lead: option_tokens(tokenizer, prompt, lead) for lead in ("", " ")}
    assert [WORDS[i] for i in ids[""]] == ["A", "B"]
    assert [WORDS[i] for i in ids[" "]] == ["ĠA", "ĠB"]
    words = tuple(replace(p, text="AB") if p.role == "option_letter" else p for p in sample.parts)
    with pytest.raises(LayoutError, match="share a letter"):
        option_tokens(tokenizer, replace(prompt, sample=replace(sample, parts=words)), "")
    spaced = replace(sample, parts=tuple(
        replace(p, text="A B") if p.role == "option_letter" else p for p in sample.parts
    ))  # fmt: skip
    with pytest.raises(LayoutError, match="not one token of its own"):
        option_tokens(tokenizer, replace(prompt, sample=spaced), "")


@pytest.mark.parametrize(
    ("top", "text", "said"),
    [(5, " B", "B"), (3, "B", None), (9, "The", None), (7, "A.", "A"), (8, "(", None)],
)
def test_an_answer_in_another_form_is_noticed(top: int, text: str, said: str | None) -> None:
    assert other_form(top, text, (2, 3), ("A", "B")) == said
