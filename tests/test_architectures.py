"""Models that people train, unmodified, with random weights and their real architectures at small sizes.

Each trains on two ranks to the numbers of one process, at stage 3 and (shards of which a gathered copy stays) at stage 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.matrix import WHOLE, matrix
from tests.ranks import run
from tests.training import close, train, zero

TOKENS, LENGTH = 96, 12


def _no_dropout(**more: Any) -> dict[str, Any]:
    return {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **more}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, use_cache=False,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, use_cache=False, tie_word_embeddings=True,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, **_no_dropout(),
        )
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, use_cache=False,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
            num_labels=5, **_no_dropout(),
        )
    )  # fmt: skip


class Encoder(nn.Module):
    """``torch.nn.TransformerEncoder`` as its documentation uses it, with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = (
            nn.Embedding(TOKENS, 32),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(32, 5),
        )

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.encoder(self.embed(ids)).mean(1)), target)


class ConvNet(nn.Module):
    """Convolutions, batch norm with each rank's own statistics, a residual, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.norm2, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 2)
        x = F.relu(x + self.norm2(self.conv(x)))
        return F.cross_entropy(self.head(x.mean((2, 3))), target)


def causal(draw: torch.Generator, rank: int, call: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, TOKENS, (2, LENGTH), generator=draw)
    return {"input_ids": ids, "labels": ids}


def masked(draw: torch.Generator, rank: int, call: int) -> dict[str, torch.Tensor]:
    """Sequences of different lengths, padded."""
    batch = causal(draw, rank, call)
    lengths = torch.randint(LENGTH // 2, LENGTH, (2, 1), generator=draw)
    return {**batch, "attention_mask": (torch.arange(LENGTH) < lengths).long()}


def images(draw: torch.Generator, rank: int, call: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(3, 3, 16, 16, generator=draw),
        "labels": torch.randint(0, 5, (3,), generator=draw),
    }


def sentences(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, ...]:
    return torch.randint(0, TOKENS, (3, LENGTH), generator=draw), torch.randint(0, 5, (3,), generator=draw)


def pictures(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, ...]:
    return tuple(images(draw, rank, call).values())


@dataclass(frozen=True)
class Random:
    """Builds a model in which no parameter is zero: a bias that starts at zero and whose true gradient is zero (BERT's keys')
    would hold nothing but rounding, of which no relative difference can be asked."""

    build: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        model = self.build()
        for param in model.parameters():
            if not param.any():
                nn.init.normal_(param, std=0.02)
        return model


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "llama": (llama, masked),
    "gpt2": (gpt2, masked),
    "qwen3": (qwen3, causal),
    "bert": (bert, masked),
    "t5": (t5, causal),
    "vit": (vit, images),
    "encoder": (Encoder, sentences),
    "convolutions": (ConvNet, pictures),
}


def architecture(name: str) -> tuple[Callable[[], nn.Module], Callable[..., Any]]:
    build, batches = ARCHITECTURES[name]
    return Random(build), batches


EACH_TIME = [*((name, 3) for name in ARCHITECTURES), ("llama", 1), ("convolutions", 1)]


@pytest.mark.parametrize(("name", "stage"), matrix(EACH_TIME, ARCHITECTURES, (1, 3)))
def test_trains_to_the_numbers_of_one_process(name: str, stage: int) -> None:
    results = run(2, train, *architecture(name), zero(stage), steps=5)
    close(results)
    if stage == 3:
        layouts = results[0]["layouts"].values()
        assert sum(layout == "shard" for layout in layouts) >= 3


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=WHOLE), "convolutions"])
def test_through_inductor(name: str) -> None:
    close(run(2, train, *architecture(name), zero(3), steps=5, inductor=True))


def test_the_first_call_in_bf16_of_a_model_that_casts_to_its_inputs_precision() -> None:
    """Llama's norms do: the first call's graph, captured in fp32, has fp32 written into it."""
    results = run(2, train, *architecture("llama"), zero(3, bf16={"enabled": True}), steps=2)
    close(results, params=False, within=1e-3)
