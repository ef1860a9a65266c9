"""A small GPT in plain PyTorch, and real text for it that any Python installation has. Nothing here knows of dspass."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """Byte-level by default: the vocabulary is the 256 values of a byte."""

    vocab: int = 256
    context: int = 256
    layers: int = 6
    heads: int = 6
    width: int = 408
    dropout: float = 0.0
    tied: bool = False
    """One matrix for the embedding and the head."""


PRESETS = {
    "12m": GPTConfig(),  # 12.3 M parameters
    "85m": GPTConfig(layers=12, heads=12, width=768),  # 85.6 M
}


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """``forward(tokens, targets)`` answers the mean loss; without targets, the logits ``[batch, length, vocab]``."""

    def __init__(self, config: GPTConfig = PRESETS["12m"]) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


_SKIPPED = {"site-packages", "dist-packages", "test", "tests"}
"""Folders left out: what else is installed there differs from machine to machine, and tests are hardly text."""


def text_corpus(least_bytes: int = 4_000_000) -> torch.Tensor:
    """At least that many bytes of Python sources, of the standard library and then of torch, as ``uint8[n]``.

    Raises ``RuntimeError`` where this installation has fewer.
    """
    parts: list[bytes] = []
    have = 0
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(_sources(folder)):
            parts.append(path.read_bytes())
            have += len(parts[-1])
            if have >= least_bytes:
                return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    raise RuntimeError(f"found only {have} bytes of Python sources, fewer than {least_bytes}: ask for less text.")


def _sources(folder: Path) -> Iterator[Path]:
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        yield from (Path(inside, name) for name in files if name.endswith(".py"))


def batches(
    data: torch.Tensor, batch: int, context: int, seed: int, rank: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless pairs of inputs and targets, ``int64[batch, context]`` each; every rank draws its own."""
    random = torch.Generator().manual_seed(seed * 100_003 + rank)
    while True:
        starts = torch.randint(0, len(data) - context - 1, (batch,), generator=random)
        rows = torch.stack([data[s : s + context + 1] for s in starts.tolist()]).long()
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def sample() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A model and one rank's batch, for ``python -m dspass explain examples.gpt:sample``."""
    tokens = torch.zeros(8, PRESETS["12m"].context, dtype=torch.long)
    return GPT(), (tokens, tokens)
