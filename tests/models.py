"""Small models for tests, one a difficulty; each is called with its batch and answers its loss.

``MODELS[name]`` is a pair: a function that builds the model, and one that draws a rank's batch for the step's n-th call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def points(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 10, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def uneven_points(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rank another number of rows."""
    rows = 4 + 3 * rank
    return torch.randn(rows, 10, generator=draw), torch.randint(0, 3, (rows,), generator=draw)


def tokens(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 9), generator=draw)
    return ids[:, :-1], ids[:, 1:]


class Mlp(nn.Module):
    """Odd sizes: rows that no number of ranks divides, fewer rows than ranks, and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, 37), nn.Linear(37, 30), nn.Linear(30, 3)
        self.norm, self.scale = nn.LayerNorm(37), nn.Parameter(torch.tensor(1.5))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.first(x))) * self.scale

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.second(self.hidden(x)))), y)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Two layers, tied head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(61, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 61, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)


class BatchNorm(nn.Module):
    """Convolutions, batch norm with local statistics, and a buffer that is written in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Linear(64, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return F.cross_entropy(self.head(F.relu(self.norm(self.conv(x[:, None]))).flatten(1)), y)


class Dropout(Mlp):
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().hidden(x), 0.3, self.training)


class Broken(Mlp):
    """A graph break in the middle, and a part that runs eagerly and reads its weight there."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.first(x))
        torch._dynamo.graph_break()
        h = self.eager(self.norm(h) * self.scale)
        return F.cross_entropy(self.head(torch.tanh(h)), y)

    @torch._dynamo.disable
    def eager(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.second.weight, self.second.bias)


class Twice(nn.Module):
    """One weight in both graphs around a break, and a submodule called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mix, self.head = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.mix(self.into(x)))))
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(torch.tanh(self.mix(h))), y)


class Checkpointed(Mlp):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.hidden, x, use_reentrant=False)
        return F.cross_entropy(self.head(torch.tanh(self.second(h))), y)


class CheckpointedAttention(Gpt):
    """Each block recomputed, its attention's random state saved for that, as ``gradient_checkpointing`` does."""

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target.flatten())


class Branches(nn.Module):
    """Which of two layers is used depends on the batch's kind: a parameter may have no gradient in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.left, self.right = nn.Linear(10, 24), nn.Linear(24, 3), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, left: bool) -> torch.Tensor:
        h = torch.tanh(self.into(x))
        return F.cross_entropy(self.left(h) if left else self.right(h), y)


class Unused(Mlp):
    """A parameter that no forward reads: its gradient stays None."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(30, 30)


def turns(draw: torch.Generator, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """For :class:`Branches`: the calls of a step take turns."""
    return (*points(draw, rank, call), call % 2 == 0)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator, int, int], Any]]] = {
    "mlp": (Mlp, points),
    "uneven": (Mlp, uneven_points),
    "gpt": (Gpt, tokens),
    "frozen": (Frozen, points),
    "batchnorm": (BatchNorm, points),
    "dropout": (Dropout, points),
    "broken": (Broken, points),
    "twice": (Twice, points),
    "checkpointed": (Checkpointed, points),
    "checkpointed_attention": (CheckpointedAttention, tokens),
    "unused": (Unused, points),
    "branches": (Branches, turns),
}
