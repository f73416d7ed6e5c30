"""Random models and prompts of real shapes, and three ways to run a knockout on them.

`peers`: as the published codes do: hooks that swap the mask, one full forward a (pathway, centre
layer), encoders included, eager attention, logits at every position.
`naive`: the strongest plain way: the same hooks, but SDPA, embeddings made once, masks built once
a pathway, the LM head at one position.
`engine`: avflow's.

What a random model computes has no meaning; how long it takes has. Needs torch and transformers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avflow.pathways import catalogue
from avflow.pathways.layout import Layout, Segment, SegmentKind
from avflow.pathways.pathway import Pathway, blocked_segments, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine.baseline import Baseline, run_baseline
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.memory import Shapes, piece_tokens
from avflow.workers.engine.plan import Batch, checkpoints, compose_batches
from avflow.workers.engine.replay import replay
from avflow.workers.engine.rows import Knockout
from avflow.workers.models.base import Decoder, Embedded

Result = TypeVar("Result")
PANEL = catalogue.SINGLE_VIDEO
BY_NAME = {pathway.name: pathway for pathway in PANEL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shapes of a model and its prompt. `pairs` of frames a chunk, each with `pair_patches`
    (height, width) patches before four are merged into a token; `sound` tokens a chunk."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: dict[str, Any]
    audio: dict[str, Any]
    chunks: int
    pair_patches: tuple[int, int]
    sound: int
    question: int
    pairs: int = 2
    window: int = 7
    byte_budget: int = 2**31

    @property
    def pair_tokens(self) -> int:
        """Tokens of a frame pair."""
        return self.pair_patches[0] * self.pair_patches[1] // 4


# Small, but with the share of a pass that the real ones have of the 3B model's at 128 frames
# (11,036 tokens): 46 and 4 TFLOP beside 61 to 97 of the decoder.
SMALL_VISION = {"depth": 8, "hidden_size": 256, "intermediate_size": 684, "num_heads": 4,
                "fullatt_block_indexes": [3, 7]}  # fmt: skip
SMALL_AUDIO = {"encoder_layers": 8, "d_model": 256, "encoder_attention_heads": 4,
               "encoder_ffn_dim": 1024}  # fmt: skip
REAL_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
               "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
REAL_AUDIO = {"encoder_layers": 32, "d_model": 1280, "encoder_attention_heads": 20,
              "encoder_ffn_dim": 5120}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model in memory, a prompt, and what the encoders read."""

    hf_model: Any
    decoder: Decoder
    layout: Layout
    embedded: Embedded
    shapes: Shapes
    size: Size
    media: dict[str, Tensor]
    device: torch.device


def build(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Random weights of the usual spread; the same arguments give the same case."""
    torch.manual_seed(seed)
    layout = build_layout(size)
    with device:
        model = _model(size, dtype)
    text = model.get_decoder()
    decoder = Decoder(
        layers=list(text.layers),
        rotary=text.rotary_emb,
        norm=text.norm,
        lm_head=model.lm_head,
        config=text.config,
    )
    n = layout.n_tokens
    shapes = Shapes(
        n_layers=size.layers,
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_size=size.hidden // size.heads,
        intermediate=size.intermediate,
        vocabulary=size.vocabulary,
        n_tokens=n,
        item_bytes=dtype.itemsize,
    )
    return Case(
        hf_model=model,
        decoder=decoder,
        layout=layout,
        embedded=Embedded(
            inputs_embeds=torch.randn(1, n, size.hidden).to(device=device, dtype=dtype),
            position_ids=torch.arange(n, device=device).expand(3, 1, n),
            attention_mask=torch.ones(1, n, dtype=torch.int64, device=device),
            input_ids=torch.zeros(1, n, dtype=torch.int64, device=device),
        ),
        shapes=shapes,
        size=size,
        media=_media(size, dtype, device),
        device=device,
    )


def _model(size: Size, dtype: torch.dtype) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    half = size.hidden // size.heads // 2
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
    }
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "rope_parameters": rope,
        },
        vision_config={**size.vision, "out_hidden_size": size.hidden},
        audio_config={**size.audio, "num_mel_bins": 128, "output_dim": size.hidden},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    # Not `.to(dtype)`: it would cast the rotary frequencies, which a loaded checkpoint keeps.
    return model.eval().requires_grad_(False)


def build_layout(size: Size) -> Layout:
    """System prompt, chunks of frame pairs and sound, a question with four options."""
    parts: list[tuple[SegmentKind, int, int | None]] = [("system", 20, None)]
    for chunk in range(size.chunks):
        parts += [
            ("frame", size.pair_tokens, size.pairs * chunk + pair) for pair in range(size.pairs)
        ]
        parts.append(("audio_chunk", size.sound, chunk))
    parts += [("template", 2, None), ("non_option_question", size.question - 37, None)]
    for option in range(4):
        parts += [("option_letter", 1, option), ("option_text", 6, option)]
    parts += [("template", 6, None), ("last", 1, None)]
    segments, at = [], 0
    for kind, length, index in parts:
        segments.append(Segment(kind=kind, start=at, stop=at + length, index=index))
        at += length
    return Layout(kind="single_video", n_tokens=at, segments=tuple(segments), answer=1)


def _media(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    pairs, (height, width) = size.pairs * size.chunks, size.pair_patches
    mel = 4 * size.sound * size.chunks  # the audio encoder halves twice
    with device:
        return {
            "pixel_values_videos": torch.randn(pairs * height * width, 1176, dtype=dtype),
            "video_grid_thw": torch.tensor([[pairs, height, width]]),
            "input_features": torch.randn(1, 128, mel, dtype=dtype),
            "feature_attention_mask": torch.ones(1, mel, dtype=torch.int64),
        }


@torch.inference_mode()
def encode(case: Case) -> Tensor:
    """Both encoders, and their outputs put in their places."""
    media, model = case.media, case.hf_model
    heard = model.get_audio_features(
        media["input_features"], media["feature_attention_mask"], return_dict=True
    ).last_hidden_state
    seen = model.get_video_features(
        media["pixel_values_videos"], media["video_grid_thw"], return_dict=True
    ).pooler_output
    hidden = case.embedded.inputs_embeds.clone()
    places: tuple[tuple[SegmentKind, Tensor], ...] = (
        ("frame", torch.cat(seen, dim=0)),
        ("audio_chunk", heard),
    )
    for kind, features in places:
        where = torch.cat([torch.arange(s.start, s.stop) for s in case.layout.of(kind)])
        hidden[0, where.to(case.device)] = features.to(hidden)
    return hidden


def dense_mask(case: Case, pathway: Pathway) -> Tensor:
    """[1, 1, N, N] additive, in the model's dtype: what the plain ways hand to a layer."""
    segment = torch.from_numpy(case.layout.segment_of_position).to(case.device)
    blocked = torch.from_numpy(blocked_segments(case.layout, pathway)).to(case.device)
    closed = blocked[segment][:, segment]
    closed.fill_diagonal_(False)
    closed |= torch.ones_like(closed).triu_(1)
    dtype = case.embedded.inputs_embeds.dtype
    mask = torch.zeros(closed.shape, dtype=dtype, device=case.device)
    return mask.masked_fill_(closed, float("-inf"))[None, None]


@contextmanager
def swapped(case: Case, mask: Tensor, center: int) -> Iterator[None]:
    """Within, the window's layers attend under `mask`."""

    def swap(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    with ExitStack() as hooks:
        for layer in window_layers(center, case.size.window, case.size.layers):
            attention = case.decoder.layers[layer].self_attn
            handle = attention.register_forward_pre_hook(swap, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@torch.inference_mode()
def naive_pass(case: Case, mask: Tensor | None, center: int) -> Tensor:
    """Probabilities [V] of one knockout (no mask: of none), the strongest plain way."""
    with ExitStack() as stack:
        if mask is not None:
            stack.enter_context(swapped(case, mask, center))
        out = case.hf_model.get_decoder()(
            inputs_embeds=case.embedded.inputs_embeds,
            position_ids=case.embedded.position_ids,
            attention_mask=case.embedded.attention_mask,
            use_cache=False,
        )
    last = out.last_hidden_state[:, -1]
    return torch.softmax(case.decoder.lm_head(last).float(), dim=-1)[0]


@torch.inference_mode()
def peers_pass(case: Case, mask: Tensor, center: int) -> Tensor:
    """The same as the peers run it. Within `eager`."""
    with swapped(case, mask, center):
        out = case.hf_model(
            inputs_embeds=encode(case),
            position_ids=case.embedded.position_ids,
            attention_mask=case.embedded.attention_mask,
            use_cache=False,
        )
    return torch.softmax(out.logits[0, -1].float(), dim=-1)


@contextmanager
def eager(case: Case) -> Iterator[None]:
    """Within, the text decoder runs eager attention."""
    config: Any = case.decoder.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Pathways at every centre layer, planned for the engine."""

    pathways: tuple[Pathway, ...]
    knockouts: tuple[Knockout, ...]
    batches: tuple[Batch, ...]


def plan(case: Case, pathways: Sequence[Pathway]) -> Job:
    """What the engine will run."""
    knockouts = []
    for pathway in pathways:
        blocked = blocked_segments(case.layout, pathway)
        windows = [
            window_layers(c, case.size.window, case.size.layers) for c in range(case.size.layers)
        ]
        knockouts.append(
            Knockout(
                blocked=blocked,
                start=first_target(case.layout, blocked),
                layer_sets=tuple(tuple(window) for window in windows),
            )
        )
    batches = compose_batches(case.layout, knockouts, case.shapes, case.size.byte_budget)
    return Job(pathways=tuple(pathways), knockouts=tuple(knockouts), batches=batches)


def prefill(case: Case, job: Job) -> Baseline:
    """The baseline that the job's batches start from."""
    return run_baseline(case.decoder, case.embedded, checkpoints(job.batches))


def engine(case: Case, job: Job, baseline: Baseline) -> dict[tuple[str, int], Tensor]:
    """(pathway, centre layer) -> probabilities [V]; the baseline given."""
    found: dict[tuple[str, int], Tensor] = {}
    tokens = piece_tokens(case.shapes, case.size.byte_budget)
    trunk: Tensor | None = None
    for batch in job.batches:
        if batch.opens:
            trunk = baseline.residual[batch.first_layer, batch.start][0]
        done = replay(case.decoder, baseline, trunk, batch, tokens)
        trunk = done.trunk
        rows = last_probabilities(case.decoder, done.last[1:])
        for answers, probabilities in zip(batch.wanted_by, rows, strict=True):
            for number, center in answers:
                found[job.pathways[number].name, center] = probabilities
    return found


def seconds(case: Case, work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time, work queued on a GPU included."""
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    began = time.perf_counter()
    result = work()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    return time.perf_counter() - began, result
