"""Token-layers and FLOPs, by hand: executed, plain, and the least that causality requires."""

import numpy as np
import pytest
from engine_ways import clip_of

from avflow.orchestrator.config import ExecutionConfig
from avflow.pathways import catalogue
from avflow.pathways.layout import Layout, Segment
from avflow.pathways.pathway import blocked_segments, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine import cost
from avflow.workers.engine.memory import Shapes, peak_bytes
from avflow.workers.engine.plan import compose_batches
from avflow.workers.engine.rows import Knockout

SMALL = Shapes(
    n_layers=4, hidden=2, heads=2, kv_heads=1, head_size=3, intermediate=5, vocabulary=7,
    n_tokens=10, item_bytes=4,
)  # fmt: skip
KEY_VALUE = 2 * (2 * 3) * 2  # k and v: 2 -> 1 head of 3
QUERY_OUTPUT = 2 * (2 * 6) * 2
LINEAR = KEY_VALUE + QUERY_OUTPUT + 3 * 2 * (2 * 5)
EDGE = 2 * 2 * (2 * 3)  # score and mix, 2 heads of 3
HEAD = 2 * 2 * 7


def blocking(
    layout: Layout, pairs: list[tuple[int, int]], *layer_sets: tuple[int, ...]
) -> Knockout:
    blocked = np.zeros((len(layout.segments),) * 2, dtype=np.bool_)
    for query, key in pairs:
        blocked[query, key] = True
    return Knockout(blocked=blocked, start=first_target(layout, blocked), layer_sets=layer_sets)


def executed(layout: Layout, shapes: Shapes, knockouts: list[Knockout], budget: int) -> cost.Cost:
    batches = compose_batches(layout, knockouts, shapes, budget)
    return sum((cost.batch_cost(shapes, batch) for batch in batches), cost.Cost())


def test_flops_of_a_token_layer_by_hand() -> None:
    assert cost.key_value_flops(SMALL) == KEY_VALUE
    assert cost.linear_flops(SMALL) == LINEAR
    assert cost.edge_flops(SMALL) == EDGE
    assert cost.head_flops(SMALL) == HEAD
    plain = cost.plain_cost(SMALL, forwards=3)
    assert plain.token_layers == 3 * 4 * 10
    assert plain.flops == 3 * (4 * (10 * LINEAR + 100 * EDGE) + HEAD)
    assert cost.prefill_floor(SMALL).flops == 4 * (10 * LINEAR + 55 * EDGE) + HEAD


def test_the_floor_by_hand() -> None:
    """Two windows of one layer over four: layer 1, then layer 3, the last. Positions 7 and 8 (a
    segment) lose 2 keys each; the last position, 9, loses none."""
    layout = clip_of(2, 5, 2)
    knockout = blocking(layout, [(2, 0)], (1,), (3,))
    floor = cost.knockout_floor(layout, SMALL, [knockout])
    assert floor.token_layers == 2 + 3 + 1  # the window at the top changes nothing: no last target
    first = 2 * (LINEAR - KEY_VALUE) + (8 + 9 - 4) * EDGE
    second = 3 * LINEAR + (8 + 9 + 10) * EDGE
    last = LINEAR + 2 * KEY_VALUE + 10 * EDGE + HEAD
    assert floor.flops == first + second + last


def test_what_a_replay_executes_by_hand() -> None:
    """The same, plus the trunk beside it (to layer 3, and to the top as the control)."""
    layout = clip_of(2, 5, 2)
    knockout = blocking(layout, [(2, 0)], (1,), (3,))
    done = executed(layout, SMALL, [knockout], 2**20)
    trunk_edges, suffix = 8 + 9 + 10, 3
    below_top = 2 * (suffix * LINEAR + trunk_edges * EDGE)  # trunk at layers 1 and 2
    joining = 2 * LINEAR + (8 + 9 - 4) * EDGE
    running = suffix * LINEAR + trunk_edges * EDGE  # the row at layer 2
    top = 2 * (suffix * (KEY_VALUE + QUERY_OUTPUT) + LINEAR + 10 * EDGE)  # trunk and row
    assert done.flops == below_top + joining + running + top + 3 * HEAD
    assert done.token_layers == 2 * 3 + 2 + 3 + 2


@pytest.mark.parametrize("n_layers", [8, 28, 36])
@pytest.mark.parametrize("window", [3, 7])
def test_the_floor_is_c_min_less_what_clipped_windows_share(n_layers: int, window: int) -> None:
    """Peers' C_min = sum over centres of |T| + (L - 2 - a) m + 1, each window on its own. Windows
    clipped at layer 0 begin alike: of h + 1 of them, all but the longest join where they part."""
    shapes = Shapes(
        n_layers=n_layers, hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=128,
        vocabulary=200, n_tokens=200, item_bytes=4,
    )  # fmt: skip
    layout = clip_of(100, 49, 40, 10)
    windows = [window_layers(c, window, n_layers) for c in range(n_layers)]
    knockout = blocking(layout, [(2, 0), (3, 0), (4, 0)], *(tuple(w) for w in windows))
    m = targets = 51
    least = sum(targets + (n_layers - 2 - w.start) * m + 1 for w in windows)
    clipped = [w for w in windows if w.start == 0][:-1]
    shared = sum(targets + (len(w) - 1) * m for w in clipped)  # layers 0 .. end of the window
    floor = cost.knockout_floor(layout, shapes, [knockout])
    assert floor.token_layers == least - shared
    done = executed(layout, shapes, [knockout], 2**26)
    assert floor.token_layers < done.token_layers
    assert floor.flops < done.flops < cost.plain_cost(shapes, n_layers).flops


def test_the_same_question_asked_twice_costs_once() -> None:
    layout = clip_of(2, 5, 2)
    once = blocking(layout, [(2, 0)], (1,), (1, 2))
    twice = [once, blocking(layout, [(2, 0)], (1, 2), (1,))]
    assert cost.knockout_floor(layout, SMALL, twice) == cost.knockout_floor(layout, SMALL, [once])
    assert executed(layout, SMALL, twice, 2**20) == executed(layout, SMALL, [once], 2**20)


def paper_layout() -> Layout:
    """128 frames at 2 a second as 64 pairs of 144 tokens, 25 sound tokens a second, in chunks of
    2 seconds; a question of 200 tokens: about 11,000, the paper's largest input."""
    parts: list[tuple[str, int, int | None]] = [("system", 20, None)]
    for chunk in range(32):
        parts += [("frame", 144, 2 * chunk), ("frame", 144, 2 * chunk + 1)]
        parts.append(("audio_chunk", 50, chunk))
    parts += [("template", 2, None), ("non_option_question", 40, None)]
    for option in range(4):
        parts += [("option_letter", 1, option), ("option_text", 12, option)]
    parts += [("template", 10, None), ("last", 1, None)]
    segments, at = [], 0
    for kind, length, index in parts:
        segments.append(Segment(kind=kind, start=at, stop=at + length, index=index))
        at += length
    return Layout(kind="single_video", n_tokens=at, segments=tuple(segments), answer=2)


THREE_B = {"n_layers": 36, "hidden": 2048, "heads": 16, "kv_heads": 2, "head_size": 128,
           "intermediate": 11008, "vocabulary": 151936, "item_bytes": 2}  # fmt: skip


@pytest.mark.parametrize("budget_gib", [2, 8])
def test_the_panel_of_22_at_the_papers_size_is_near_the_bound(budget_gib: int) -> None:
    """Executed FLOPs at most 1.15 x the exact lower bound, counted without running it."""
    layout = paper_layout()
    shapes = Shapes(**THREE_B, n_tokens=layout.n_tokens)
    assert 10_800 < layout.n_tokens < 11_200
    centers = tuple(tuple(window_layers(c, 7, 36)) for c in range(36))
    knockouts = []
    for pathway in catalogue.SINGLE_VIDEO:
        blocked = blocked_segments(layout, pathway)
        start = first_target(layout, blocked)
        knockouts.append(Knockout(blocked=blocked, start=start, layer_sets=centers))
    done = cost.prefill_floor(shapes) + executed(layout, shapes, knockouts, budget_gib * 2**30)
    floor = cost.prefill_floor(shapes) + cost.knockout_floor(layout, shapes, knockouts)
    plain = cost.plain_cost(shapes, 1 + 22 * 36)
    assert floor.flops < done.flops <= 1.15 * floor.flops
    assert plain.token_layers / done.token_layers > 6.5  # 7.4 by the peers' count at N = 4,000
    print(f"executed / bound {done.flops / floor.flops:.3f}, "
          f"plain / executed {plain.flops / done.flops:.2f}")  # fmt: skip


SEVEN_B = {"n_layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "head_size": 128,
           "intermediate": 18944, "vocabulary": 152064, "item_bytes": 2}  # fmt: skip


@pytest.mark.parametrize(("sizes", "weights"), [(THREE_B, 9.4e9), (SEVEN_B, 17.9e9)])
def test_the_papers_size_fits_a_card_of_24_gb(sizes: dict[str, int], weights: float) -> None:
    """Computed from shapes, with the default byte budget; the weights are the whole thinker's."""
    shapes = Shapes(**sizes, n_tokens=11_000)
    default = ExecutionConfig().byte_budget
    assert peak_bytes(shapes, int(weights), default) < 24e9
    assert peak_bytes(shapes, int(weights), 16 * default) < 80e9
    budgets = [peak_bytes(shapes, int(weights), power * 2**30) for power in (1, 2, 4, 8)]
    assert budgets == sorted(budgets)
