"""The token that stands for an option: its letter in the form in which the model answers.

After a chat template that ends in a newline a model answers "B"; after one that ends in a word
("ASSISTANT:") it answers " B", which is another token. Which of the two is decided once a model,
from its template and tokenizer; conformance compares it with what the model really says.
"""

from collections.abc import Sequence
from typing import Any


def answer_lead(tokenizer: Any, rendered: str) -> str:
    """What comes before the letter of an answer to a `rendered` prompt: "" or " "."""
    if not rendered or rendered[-1].isspace():
        return ""
    bare, spaced = (continuation(tokenizer, rendered, lead + "A") for lead in ("", " "))
    one_token = spaced is not None and len(spaced) == 1
    return " " if one_token and spaced != bare else ""


def continuation(tokenizer: Any, prompt: str, text: str) -> list[int] | None:
    """The tokens that `text` adds to the prompt's; None if it changes the prompt's own."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    longer: list[int] = tokenizer(prompt + text)["input_ids"]
    return longer[len(ids) :] if longer[: len(ids)] == ids else None


def other_form(top: int, text: str, tokens: Sequence[int], letters: Sequence[str]) -> str | None:
    """The letter that the top token, of this `text`, spells in a form that is not counted.

    `tokens` are those counted, one a letter. None where the top token is counted, or no letter.
    """
    spelled = text.strip().rstrip(".:)")
    if top in tokens or spelled not in letters:
        return None
    return spelled
