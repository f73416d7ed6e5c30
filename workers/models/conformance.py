"""What every adapter must pass: the same few questions put to a loaded model and real samples.

Each answer has a name, a result and a reason, so that one who adds a family, or brings a checkpoint
nobody here has seen, knows what to trust. Goes through `run_unit` as a sweep does; what it is
compared with is the official model: its forward, its generate, and the plain masked reference.

Shapes: N prompt tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from avflow.datasets.media import MediaError
from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import LayoutError
from avflow.workers.engine import reference
from avflow.workers.engine.interface import causal_mask
from avflow.workers.models.answers import other_form
from avflow.workers.models.base import Embedded, LoadedModel, UnsupportedModelError
from avflow.workers.models.conformance_run import (
    Case,
    Ran,
    half,
    present,
    run,
    something,
    through_run_unit,
)
from avflow.workers.protocol import CurveDone

__all__ = ["Case", "Check", "Result", "conformance"]

# Of a probability, between two ways of computing it; bfloat16 keeps 8 bits.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 3e-2}
_LEAST = 1e-30  # probabilities below are none

Result = Literal["passed", "failed", "refused", "skipped"]
_Answer = tuple[bool | None, str]  # None: there was nothing to ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question's outcome. `sample` None: of the model as a whole. `refused`: the family does
    not take such prompts and says so, which is no failure."""

    name: str
    sample: str | None
    result: Result
    reason: str


def conformance(model: LoadedModel, cases: Sequence[Case]) -> Iterator[Check]:
    """Put every question to every case, as a stream. Raises nothing of the model's own."""
    ran: list[Ran] = []
    for case in cases:
        name = case.sample.sample_id
        try:
            prepared = model.prepare(case.sample, case.media)
        except (LayoutError, MediaError, UnsupportedModelError) as error:
            yield Check(name="prompt", sample=name, result="refused", reason=str(error))
            continue
        except Exception as error:  # an adapter's mistake is this suite's finding
            yield _failed("prompt", name, error)
            continue
        kinds = ", ".join(part.kind for part in case.sample.media)
        reason = f"{prepared.layout.n_tokens} tokens; media: {kinds}"
        yield Check(name="prompt", sample=name, result="passed", reason=reason)
        try:
            ran.append(run(model, case, prepared))
        except Exception as error:
            yield _failed("run", name, error)
            continue
        for question, ask in _OF_A_CASE.items():
            yield _asked(question, name, partial(ask, model, ran[-1]))
        yield _generate_check(model, ran[-1])
    for one in ran:  # after all the others, whose traces it would show
        name = one.case.sample.sample_id
        yield _asked("same bits again", name, partial(_same_again, model, one))
    yield _asked("attention functions", None, lambda: _attention_functions(model))
    yield _asked("takes some prompt", None, lambda: _takes_some(len(ran), len(cases)))


def _asked(name: str, sample: str | None, ask: Callable[[], _Answer]) -> Check:
    try:
        passed, reason = ask()
    except Exception as error:
        return _failed(name, sample, error)
    result: Result = "skipped" if passed is None else "passed" if passed else "failed"
    return Check(name=name, sample=sample, result=result, reason=reason)


def _failed(name: str, sample: str | None, error: Exception) -> Check:
    return Check(
        name=name, sample=sample, result="failed", reason=f"{type(error).__name__}: {error}"
    )


# -- questions about one sample --------------------------------------------------------------


def _groups_cover(model: LoadedModel, ran: Ran) -> _Answer:
    layout, ids = ran.prepared.layout, ran.embedded.input_ids[0].tolist()
    at = 0
    for segment in layout.segments:
        if segment.start != at or segment.stop <= segment.start:
            return False, f"segment {segment.name} starts at {segment.start}, expected {at}"
        at = segment.stop
    if not at == layout.n_tokens == len(ids) == ran.embedded.inputs_embeds.shape[1]:
        return False, f"segments end at {at}, the prompt has {len(ids)} tokens"
    if layout.segments[-1].kind != "last" or layout.segments[-1].start != at - 1:
        return False, "the last position is no segment of its own"
    for segment in layout.segments:
        if segment.kind == "option_letter":
            said, letter = model.token_text(ids[segment.start]), LETTERS[segment.index or 0]
            if segment.stop - segment.start != 1 or said.strip() != letter:
                return False, f"{segment.name} is the token {said!r}"
    groups = [*present(layout), "last"]
    held = np.concatenate([group_positions(layout, g, option_span="full") for g in groups])
    missing = sorted(set(range(at)) - set(held.tolist()))
    if missing:
        return False, f"positions {missing[:5]} belong to no group"
    return True, f"{len(layout.segments)} segments, groups {', '.join(present(layout))}"


def _layers_equal_forward(model: LoadedModel, ran: Ran) -> _Answer:
    with torch.no_grad():
        hidden = _by_layers(model, ran.embedded)
    official, own = ran.seen.positions, ran.embedded.position_ids
    if official is not None and not torch.equal(official[-own.shape[0] :].cpu(), own.cpu()):
        wrong = int((official[-own.shape[0] :].cpu() != own.cpu()).any(dim=0).sum())
        return False, f"the official forward gives {wrong} tokens other positions"
    if not torch.equal(hidden.cpu(), ran.seen.hidden.cpu()):
        apart = (hidden.cpu() - ran.seen.hidden.cpu()).abs().max()
        return False, f"the last layer's output is up to {float(apart):.2g} apart"
    return True, f"bit for bit, after {len(model.decoder.layers)} layers"


def _by_layers(model: LoadedModel, embedded: Embedded) -> Tensor:
    decoder, hidden = model.decoder, embedded.inputs_embeds
    mask = causal_mask(decoder, hidden, embedded.attention_mask)
    rotary = decoder.rotary(hidden, embedded.position_ids)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden


def _nothing_is_plain(model: LoadedModel, ran: Ran) -> _Answer:
    plain = torch.softmax(ran.seen.logits.double(), dim=-1).cpu().numpy()
    found = [
        (float(ran.curves["nothing"].p_knockout[0]), float(plain[ran.done.base_token])),
        (float(ran.curves["something"].p_base), float(plain[ran.done.base_token])),
        *zip(ran.done.p_options, plain[list(ran.prepared.option_tokens)], strict=True),
    ]
    apart = max(abs(one - other) for one, other in found)
    return apart <= TOLERANCE[model.spec.dtype], f"probabilities at most {apart:.2g} apart"


def _everything_counts(model: LoadedModel, ran: Ran) -> _Answer:
    """The last token reads itself alone, in every layer."""
    done, n_tokens = ran.curves["everything"], ran.prepared.layout.n_tokens
    counted, there = int(done.n_blocked_edges[0]), (n_tokens - 1) * model.info.n_layers
    if counted != there:
        return False, f"{counted} edges were blocked, expected {there}"
    edges = reference.edges_between(n_tokens, range(n_tokens - 1), [n_tokens - 1])
    passed, reason = _as_the_reference(model, ran, done, edges, model.info.n_layers)
    p = float(done.p_knockout[0])
    reason = f"p of the top token {done.p_base:.4f} -> {p:.4f}; {reason}"
    return passed and p != done.p_base, reason


def _engine_equals_reference(model: LoadedModel, ran: Ran) -> _Answer:
    layout, pathway = ran.prepared.layout, something(ran.prepared.layout)
    ends = [
        sorted({int(p) for name in names for p in group_positions(layout, name)})
        for names in (pathway.sources, pathway.targets)
    ]
    edges = reference.edges_between(layout.n_tokens, ends[0], ends[1])
    window = half(model.info.n_layers)
    passed, reason = _as_the_reference(model, ran, ran.curves["something"], edges, window)
    return passed, f"{'+'.join(pathway.sources)} to {'+'.join(pathway.targets)}: {reason}"


def _as_the_reference(
    model: LoadedModel, ran: Ran, done: CurveDone, edges: reference.Edges, window: int
) -> _Answer:
    """A curve's answers against the unmodified model with `edges` in a dense mask."""
    inputs = reference.Inputs(
        inputs_embeds=ran.embedded.inputs_embeds,
        position_ids=ran.embedded.position_ids,
        attention_mask=ran.embedded.attention_mask,
    )
    tokens = [*ran.prepared.option_tokens, ran.done.base_token]
    found = []
    for center in done.center_layer.tolist():
        expected = reference.knockout_probabilities(model.hf_model, inputs, edges, center, window)
        found.append(expected[tokens].double().cpu().numpy())
    right, unmasked = np.stack(found), np.append(ran.done.p_options, ran.done.p_base)
    answers = np.column_stack([done.p_options, done.p_knockout])
    apart = float(np.abs(right - answers).max())
    # In logarithms: a model that is sure of its answer hardly moves its probability.
    moved, wrong = (
        float(np.abs(np.log((right + _LEAST) / (other + _LEAST))).max())
        for other in (unmasked, answers)
    )
    reason = (
        f"moves log probabilities by {moved:.2g}, the two at most {wrong:.2g} apart "
        f"(probabilities {apart:.2g})"
    )
    return apart <= TOLERANCE[model.spec.dtype] and wrong <= moved / 4, reason


def _answers_in_form(model: LoadedModel, ran: Ran) -> _Answer:
    top, tokens = ran.done.base_token, ran.prepared.option_tokens
    text = model.token_text(top)
    letter = other_form(top, text, tokens, LETTERS[: len(tokens)])
    if letter is not None:
        counted = model.token_text(tokens[LETTERS.index(letter)])
        return False, f"the model answers {text!r}; counted is {counted!r}, another token"
    if top not in tokens:
        return None, f"top-1 is {text!r}, no option's letter: it says nothing of their form"
    return True, f"top-1 is {text!r}"


_OF_A_CASE: dict[str, Callable[[LoadedModel, Ran], _Answer]] = {
    "token groups cover the prompt": _groups_cover,
    "layer loop equals forward": _layers_equal_forward,
    "blocking nothing equals forward": _nothing_is_plain,
    "blocking all before last changes it": _everything_counts,
    "engine equals reference": _engine_equals_reference,
    "answers in the form that is counted": _answers_in_form,
}


# -- generate --------------------------------------------------------------------------------


def _generate_check(model: LoadedModel, ran: Ran) -> Check:
    name, sample = "first token equals generate's", ran.case.sample.sample_id
    if not hasattr(model.hf_model, "generate"):
        reason = f"{type(model.hf_model).__name__} has no generate"
        return Check(name=name, sample=sample, result="skipped", reason=reason)
    return _asked(name, sample, lambda: _first_token(model, ran))


def _first_token(model: LoadedModel, ran: Ran) -> _Answer:
    """Greedy, with all that a checkpoint's generation_config.json asks for switched off."""
    hf: Any = model.hf_model
    neutral: Any = GenerationConfig  # untyped
    shipped = hf.generation_config
    hf.generation_config = neutral(
        do_sample=False, eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id
    )
    try:
        inputs = model.official_inputs(ran.prepared)
        with torch.no_grad():
            made = hf.generate(**inputs, max_new_tokens=1)
    finally:
        hf.generation_config = shipped
    token, own = int(made[0, -1]), ran.done.base_token
    off = shipped_processors(shipped)
    note = f"; generation_config.json asks for {off}, which is switched off" if off else ""
    if token == own:
        return True, f"{model.token_text(token)!r}{note}"
    apart = float(ran.seen.logits[token].double() - ran.seen.logits[own].double())
    rounding = 2 * torch.finfo(ran.seen.logits.dtype).eps * float(ran.seen.logits[token].abs())
    words = f"generate says {model.token_text(token)!r}, the engine {model.token_text(own)!r}"
    return abs(apart) <= rounding, f"{words}; logits {apart:.2g} apart (rounding {rounding:.2g})"


def shipped_processors(config: GenerationConfig) -> str:
    """What a checkpoint's generation config would do to logits: `repetition_penalty=1.05`, ..."""
    neutral: dict[str, object] = {
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "bad_words_ids": None,
        "min_length": 0,
        "min_new_tokens": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "sequence_bias": None,
        "guidance_scale": None,
        "exponential_decay_length_penalty": None,
        "do_sample": False,
    }
    if config.do_sample:
        neutral |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    found = {key: getattr(config, key, None) for key in neutral}
    return ", ".join(
        f"{key}={value}"
        for key, value in found.items()
        if value is not None and value != neutral[key]
    )


# -- questions about the model ---------------------------------------------------------------


def _same_again(model: LoadedModel, ran: Ran) -> _Answer:
    curves, done = through_run_unit(model, ran.case, ran.prepared.layout)
    pairs = [(done.p_options, ran.done.p_options)]
    pairs += [(curves[name].p_options, ran.curves[name].p_options) for name in ran.curves]
    same = all(one.tobytes() == other.tobytes() for one, other in pairs)
    return same, "after other samples and generate" if same else "a second run gives other bits"


def _attention_functions(model: LoadedModel) -> _Answer:
    """Without a mask function an attention gets no mask at all, and padding would be read."""
    text: Any = model.decoder.config
    found = {"decoder": text._attn_implementation}
    for name, part in model.hf_model.named_modules():
        config = getattr(part, "config", None)
        if config is not None and config is not text and "." in name:
            found[name] = getattr(config, "_attn_implementation", None) or "none"
    if found["decoder"] != model.spec.attention:
        return False, f"the decoder runs {found['decoder']}, asked for was {model.spec.attention}"
    unknown = {n: i for n, i in found.items() if i not in (*ALL_MASK_ATTENTION_FUNCTIONS, "none")}
    if unknown:
        return False, f"no mask function for {unknown}"
    return True, f"decoder: {found['decoder']}; others: {', '.join(sorted(set(found.values())))}"


def _takes_some(taken: int, given: int) -> _Answer:
    return taken > 0, f"{taken} of {given} samples were taken"
