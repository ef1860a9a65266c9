"""Mixtures of experts in plain torch, as people write them: batched in GShard's form, and as a loop over experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import dspass
from dspass.mixture import Product

VOCABULARY, WIDTH = 29, 12


def gate(scores: torch.Tensor, top_k: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts ``[k, tokens]`` and their places, beyond the capacity for those that are dropped; all first choices before the
    second ones, as in GShard."""
    experts = scores.topk(top_k, dim=-1).indices.t()
    every = F.one_hot(experts, scores.shape[1]).flatten(0, 1)
    places = ((every.cumsum(0) - 1) * every).sum(-1).view(top_k, -1)
    return experts, places


class GShard(nn.Module):
    """Experts of ``capacity_factor``; ``form`` says how rows are moved and multiplied."""

    def __init__(self, experts: int, top_k: int, form: str, capacity_factor: float = 1.0) -> None:
        super().__init__()
        inner = 2 * WIDTH + 2
        self.top_k, self.form, self.capacity_factor = top_k, form, capacity_factor
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, inner) / 3)
        self.down = nn.Parameter(torch.randn(experts, inner, WIDTH) / 5)
        self.up_bias = nn.Parameter(torch.randn(experts, inner) / 10)
        self.down_bias = nn.Parameter(torch.randn(experts, 1, WIDTH) / 10)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "einsum":
            x = torch.einsum("ecm,emf->ecf", x, self.up) + self.up_bias[:, None]
            return torch.einsum("efm,ecf->ecm", self.down, F.gelu(x)) + self.down_bias
        if self.form == "bmm":
            x = torch.baddbmm(self.up_bias.unsqueeze(1), x, self.up).relu_()
            return torch.bmm(x, self.down) + self.down_bias
        gates, values = (x @ self.up).chunk(2, dim=-1)
        x = torch.cat([F.silu(gates) * values, torch.tanh(gates)], dim=-1)
        return x.matmul(self.down) * torch.sigmoid(x.mean(-1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, experts = x.shape[0], self.router.out_features
        capacity = max(2, -(-int(tokens * self.top_k * self.capacity_factor) // experts))
        scores = self.router(x).softmax(-1, dtype=torch.float32).to(x.dtype)
        chosen, places = gate(scores, self.top_k, capacity)
        is_kept = places < capacity
        weights = scores.t().gather(0, chosen) * is_kept
        if self.form == "index":  # the last row is for those that are dropped
            rows = torch.where(is_kept, chosen * capacity + places, experts * capacity)
            spread = x.new_zeros(experts * capacity + 1, WIDTH)
            spread = spread.index_add(0, rows.flatten(), x.repeat(self.top_k, 1))
            y = self.inside(spread[:-1].view(experts, capacity, WIDTH)).flatten(0, 1)
            return (F.pad(y, (0, 0, 0, 1))[rows] * weights[..., None]).sum(0)
        masks = (
            F.one_hot(chosen, experts)[..., None] * F.one_hot(places.clamp(max=capacity), capacity + 1)[..., None, :-1]
        )
        combine = (weights[..., None, None] * masks.to(x.dtype)).sum(0)
        dispatched = torch.einsum("sec,sm->ecm", masks.sum(0).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.inside(dispatched))


class Model(nn.Module):
    """Two layers of experts between an embedding and a head; answers the loss of ids ``[..., tokens]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids.flatten()[:-1])
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return F.cross_entropy(self.head(x).float(), ids.flatten()[1:])


class Grouped(nn.Module):
    """``dspass.experts``, and the loop that it stands for in code that is not compiled, with no more than ``capacity(rows)``
    rows for an expert. ``lean`` is added to the first expert's scores."""

    def __init__(
        self,
        experts: int,
        top_k: int,
        *,
        biases: bool = False,
        lean: float = 0.0,
        capacity: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__()
        inner = 2 * WIDTH + 4
        self.top_k, self.lean, self.capacity = top_k, lean, capacity
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, inner) / 3)
        self.down = nn.Parameter(torch.randn(experts, inner // 2, WIDTH) / 4)
        self.up_bias = nn.Parameter(torch.randn(experts, inner) / 5) if biases else None
        self.down_bias = nn.Parameter(torch.randn(experts, WIDTH) / 5) if biases else None

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.router(x).float()
        logits = torch.cat([logits[..., :1] + self.lean, logits[..., 1:]], dim=-1)
        scores, choices = logits.softmax(-1).topk(self.top_k, dim=-1)
        return choices, scores

    def expert(self, rows: torch.Tensor, product: Product, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gates, values = product(rows, up, self.up_bias).chunk(2, dim=-1)
        return product(F.silu(gates) * values, down, self.down_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choices, scores = self.route(x)
        if torch.compiler.is_compiling():
            return dspass.experts(x, choices, scores, self.expert, self.up, self.down)
        most = None if self.capacity is None else self.capacity(choices.numel())
        return looped(x, choices, scores, self.expert, self.up, self.down, most=most)


def looped(
    x: torch.Tensor,
    choices: torch.Tensor,
    scores: torch.Tensor,
    function: Callable[..., torch.Tensor],
    *weights: torch.Tensor,
    most: int | None = None,
) -> torch.Tensor:
    """Expert by expert, of each the first ``most`` rows in the order of tokens, in fp32 sums."""
    flat = x.reshape(-1, x.shape[-1])
    routing, weight = (t.reshape(-1, choices.shape[-1]) for t in (choices, scores))
    result = torch.zeros(())
    for e in range(weights[0].shape[0]):
        token, k = (routing == e).nonzero(as_tuple=True)
        token, k = token[:most], k[:most]

        def product(
            rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None, e: int = e
        ) -> torch.Tensor:
            return rows @ matrix[e] if bias is None else rows @ matrix[e] + bias[e]

        made = function(flat[token], product, *weights).float() * weight[token, k, None].float()
        result = result + made.new_zeros(flat.shape[0], made.shape[1]).index_add(0, token, made)
    return result.to(x.dtype).view(*x.shape[:-1], result.shape[-1])
