"""The plain reference pass: independent of everything it checks, and really blocking."""

import ast
from pathlib import Path

import pytest
import torch

from avflow.workers.engine import reference

SOURCE = Path(__file__).parents[1] / "workers" / "engine" / "reference.py"


@pytest.fixture
def case(tiny_thinker, random_layout, random_embedded):
    """An eager model, its inputs, and the edges of one frame's tokens to the question's."""
    tiny = tiny_thinker(attention="eager")
    embedded = random_embedded(random_layout("single_video", 100, 1), tiny, 1)
    inputs = reference.Inputs(
        inputs_embeds=embedded.inputs_embeds,
        position_ids=embedded.position_ids,
        attention_mask=embedded.attention_mask,
    )
    edges = reference.edges_between(100, range(10, 30), range(60, 80))
    return tiny.hf_model, inputs, edges


def test_it_imports_nothing_of_ours() -> None:
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in {"accelerate", "collections", "contextlib", "dataclasses",
                                          "torch", "typing"}  # fmt: skip


def test_blocked_attention_weights_are_exactly_zero_in_the_window_alone(case) -> None:
    model, inputs, edges = case
    none = torch.zeros_like(edges)
    before = reference.attention_weights(model, inputs, none, 3, 3)
    weights = reference.attention_weights(model, inputs, edges, 3, 3)
    future = torch.ones(100, 100).triu(1).bool()
    for layer, (plain, knocked) in enumerate(zip(before, weights, strict=True)):
        assert plain.shape == (4, 100, 100)
        assert (plain[:, edges] > 0).all()
        if layer in (2, 3, 4):
            assert (knocked[:, edges] == 0).all()
            assert (knocked[:, ~edges & ~future] > 0).all()
        else:
            assert (knocked[:, edges] > 0).all()
        assert (knocked[:, future] == 0).all()
        torch.testing.assert_close(knocked.sum(-1), torch.ones(4, 100))
        if layer < 2:
            assert torch.equal(plain, knocked)


def test_the_first_window_layer_is_softmax_over_what_is_left(case) -> None:
    """Eq. 2: blocked keys leave, the others share their weight in proportion."""
    model, inputs, edges = case
    plain = reference.attention_weights(model, inputs, torch.zeros_like(edges), 2, 1)[2]
    knocked = reference.attention_weights(model, inputs, edges, 2, 1)[2]
    kept = plain.masked_fill(edges, 0)
    torch.testing.assert_close(knocked, kept / kept.sum(-1, keepdim=True))


def test_no_edges_change_nothing_and_hooks_are_gone(case) -> None:
    model, inputs, edges = case
    before = reference.plain_probabilities(model, inputs)
    torch.testing.assert_close(before.sum(), torch.tensor(1.0))
    empty = reference.knockout_probabilities(model, inputs, torch.zeros_like(edges), 3, 3)
    torch.testing.assert_close(empty, before, atol=1e-7, rtol=0)
    changed = reference.knockout_probabilities(model, inputs, edges, 3, 3)
    assert (changed - before).abs().max() > 1e-3
    with pytest.raises(KeyError, match="inside"), reference.knocked_out(model, edges, 3, 3):
        raise KeyError("inside")
    assert torch.equal(reference.plain_probabilities(model, inputs), before)
    for layer in model.get_decoder().layers:
        assert not layer.self_attn._forward_pre_hooks


def test_probabilities_are_the_models_own_logits(case) -> None:
    model, inputs, _ = case
    with torch.no_grad():
        logits = model(
            inputs_embeds=inputs.inputs_embeds,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
        ).logits
    expected = torch.softmax(logits[0, -1], dim=-1)
    torch.testing.assert_close(reference.plain_probabilities(model, inputs), expected)


@pytest.mark.parametrize(
    ("center", "window", "masked"),
    [(3, 3, [2, 3, 4]), (0, 3, [0, 1]), (7, 7, [4, 5, 6, 7]), (3, 1, [3]), (3, 2, [2, 3])],
)
def test_windows_are_clipped(case, center: int, window: int, masked: list[int]) -> None:
    model, _, edges = case
    with reference.knocked_out(model, edges, center, window) as layers:
        hooked = [bool(m.self_attn._forward_pre_hooks) for m in model.get_decoder().layers]
    assert list(layers) == masked
    assert [i for i, held in enumerate(hooked) if held] == masked


def test_edges_by_eye() -> None:
    def drawn(edges: torch.Tensor) -> list[str]:
        return ["".join("x" if x else "." for x in row) for row in edges.tolist()]

    assert drawn(reference.edges_between(4, [0, 1], [2])) == ["....", "....", "xx..", "...."]
    assert drawn(reference.edges_between(4, [1], [2], both_ways=True)) == [
        "....",
        "..x.",
        ".x..",
        "....",
    ]
    assert drawn(reference.edges_between(3, [0, 1], [0, 1])) == [".x.", "x..", "..."]
    assert drawn(reference.edges_across(4, [[0, 1], [2]])) == ["..x.", "..x.", "xx..", "...."]


def test_weights_of_an_sdpa_model_are_refused(tiny_thinker, case) -> None:
    _, inputs, edges = case
    with pytest.raises(ValueError, match="this one has sdpa"):
        reference.attention_weights(tiny_thinker().hf_model, inputs, edges, 3, 3)
