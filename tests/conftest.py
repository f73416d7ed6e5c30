"""What tests of several areas share: tiny random thinkers, and prompts laid out by hand."""

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from avflow.pathways.layout import Layout, LayoutKind, Segment, SegmentKind

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="session")
def benchmark_scripts() -> Iterator[dict[str, ModuleType]]:
    """By name, as `python benchmarks/NAME.py` finds them: each other by name."""
    names = ("cases", "bounds", "engine", "discard", "gpu")
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))
    for name in names:
        del sys.modules[name]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A random thinker in memory: the Hugging Face model and the pieces of its decoder."""

    hf_model: Any
    decoder: Any
    info: Any


@pytest.fixture(scope="session")
def tiny_thinker() -> Callable[..., Tiny]:
    """Build a Qwen2.5-Omni thinker with random weights, `spread` times the usual one: ten, so that
    a blocked edge moves probabilities a lot. The same arguments give the same weights."""

    def build(
        *,
        n_layers: int = 8,
        hidden: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        dtype: str = "float32",
        attention: str = "sdpa",
        seed: int = 0,
        spread: int = 10,
    ) -> Tiny:
        import torch
        from transformers import (
            Qwen2_5OmniThinkerConfig,
            Qwen2_5OmniThinkerForConditionalGeneration,
        )

        from avflow.workers.models.base import Decoder, ModelInfo

        half = hidden // heads // 2
        rope = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        }
        config = Qwen2_5OmniThinkerConfig(
            text_config={
                "vocab_size": 200,
                "hidden_size": hidden,
                "intermediate_size": 2 * hidden,
                "num_hidden_layers": n_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "max_position_embeddings": 4096,
                "rope_parameters": rope,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 1,
                "out_hidden_size": hidden,
                "fullatt_block_indexes": [0],
            },
            audio_config={
                "num_mel_bins": 128,
                "encoder_layers": 1,
                "encoder_attention_heads": 1,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "output_dim": hidden,
            },
            audio_token_index=100,
            image_token_index=101,
            video_token_index=102,
            audio_start_token_id=103,
            audio_end_token_id=104,
            vision_start_token_id=105,
            vision_end_token_id=106,
        )
        config.text_config._attn_implementation = attention
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(spread)
        model = model.to(getattr(torch, dtype))
        text = model.get_decoder()
        decoder = Decoder(
            layers=list(text.layers),
            rotary=text.rotary_emb,
            norm=text.norm,
            lm_head=model.lm_head,
            config=text.config,
        )
        info = ModelInfo(
            n_layers=n_layers,
            hidden_size=hidden,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_size=hidden // heads,
            intermediate_size=2 * hidden,
            vocab_size=200,
            parameters=sum(p.numel() for p in model.parameters()),
            digest="tiny",
        )
        return Tiny(hf_model=model, decoder=decoder, info=info)

    return build


def _lay(
    kind: LayoutKind, pieces: list[tuple[SegmentKind, int, int | None]], **rest: int
) -> Layout:
    segments, at = [], 0
    for segment_kind, length, index in pieces:
        segments.append(Segment(kind=segment_kind, start=at, stop=at + length, index=index))
        at += length
    return Layout(kind=kind, n_tokens=at, segments=tuple(segments), **rest)


@pytest.fixture(scope="session")
def random_layout() -> Callable[[LayoutKind, int, int], Layout]:
    """A prompt of `n_tokens` cut at random into the segments that its kind has."""

    def build(kind: LayoutKind, n_tokens: int, seed: int) -> Layout:
        rng = random.Random(seed)
        media: list[tuple[SegmentKind, int, int | None]] = []
        options: list[tuple[SegmentKind, int, int | None]] = []
        for i in range(4):
            options += [("option_letter", 1, i), ("option_text", rng.randint(1, 4), i)]
        question: tuple[SegmentKind, int, int | None] = (
            "non_option_question",
            rng.randint(3, 12),
            None,
        )
        tail = [*options, ("template", rng.randint(1, 5), None), ("last", 1, None)]
        if kind == "single_video":
            n_chunks = rng.randint(2, 6)
            head = [("system", rng.randint(1, 9), None), ("template", 2, None)]
            end = [("template", 2, None), question, ("template", 2, None), *tail]
            kinds = [(k, i) for i in range(n_chunks) for k in ("frame", "audio_chunk")]
        else:
            head = [("system", rng.randint(1, 9), None)]
            end = [("template", 1, None), *tail]
            kinds = [("candidate", i) for i in range(4)] + [("question", 0), ("reference", None)]
        left = n_tokens - sum(p[1] for p in head + end)
        share = left // len(kinds) - 3
        for segment_kind, index in kinds:
            if segment_kind == "question":
                media += [("template", 1, None), question, ("template", 1, None)]
            else:
                media.append((segment_kind, share + rng.randint(-2, 2), index))
        filler = n_tokens - sum(p[1] for p in head + media + end)
        media.append(("template", filler, None))
        rest = {"answer": rng.randrange(4)}
        if kind == "interleaved":
            rest["correct_candidate"] = rest["answer"]
        return _lay(kind, head + media + end, **rest)

    return build


@pytest.fixture(scope="session")
def random_embedded() -> Callable[..., Any]:
    """Random decoder inputs for a prompt: embeddings of unit spread, and M-RoPE positions that
    advance through text, jump about in media and fall back after them, as real ones do."""

    def build(layout: Layout, tiny: Tiny, seed: int) -> Any:
        import torch

        from avflow.workers.models.base import Embedded

        generator = torch.Generator().manual_seed(seed)
        n_tokens, at = layout.n_tokens, 0
        positions = torch.empty(3, n_tokens, dtype=torch.int64)
        for segment in layout.segments:
            length = segment.stop - segment.start
            if segment.kind in ("frame", "audio_chunk", "candidate", "reference"):
                jumps = torch.randint(0, 12, (3, length), generator=generator)
                positions[:, segment.start : segment.stop] = at + jumps
                at += 6  # lower than what was reached: later tokens may fall below
            else:
                positions[:, segment.start : segment.stop] = at + torch.arange(length)
                at += length
        dtype = next(tiny.hf_model.parameters()).dtype
        shape = (1, n_tokens, tiny.info.hidden_size)
        embeds = torch.randn(*shape, generator=generator)
        return Embedded(
            inputs_embeds=embeds.to(dtype),
            position_ids=positions[:, None],
            attention_mask=torch.ones(1, n_tokens, dtype=torch.int64),
            input_ids=torch.zeros(1, n_tokens, dtype=torch.int64),
        )

    return build
