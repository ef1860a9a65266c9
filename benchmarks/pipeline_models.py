"""Models whose layers are divided over ranks, each in two forms: as it is, and in pieces, as those who cut by hand write them.

``gpt`` has layers that cost the same and little before and behind them. ``llama`` is transformers' own, with a vocabulary whose
head costs as much as several layers. ``uneven`` has layers whose inner widths grow, as pruning leaves them. In all of them one
tensor goes from layer to layer, so that any way of cutting between layers takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from examples.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class Shape:
    """A model of ``kind``; ``batch`` are samples of a step, ``context`` the tokens of each."""

    kind: str
    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int


#: By size. ``full``: GPT-2 small without its vocabulary; a Llama whose embedding and head have half of the parameters.
SHAPES = {
    "full": {
        "gpt": Shape("gpt", layers=12, width=768, heads=12, vocab=256, context=128, batch=8),  # 85.5 M parameters
        "llama": Shape("llama", layers=12, width=512, heads=8, vocab=32_000, context=128, batch=8),  # 70.1 M
        "uneven": Shape("uneven", layers=12, width=512, heads=8, vocab=256, context=128, batch=8),  # 41.3 M
    },
    "small": {
        "gpt": Shape("gpt", layers=6, width=256, heads=4, vocab=256, context=64, batch=8),
        "llama": Shape("llama", layers=6, width=192, heads=4, vocab=8_000, context=64, batch=8),
        "uneven": Shape("uneven", layers=6, width=192, heads=4, vocab=256, context=64, batch=8),
    },
    "tiny": {
        "gpt": Shape("gpt", layers=4, width=32, heads=2, vocab=256, context=16, batch=4),
        "llama": Shape("llama", layers=4, width=32, heads=2, vocab=512, context=16, batch=4),
        "uneven": Shape("uneven", layers=4, width=32, heads=2, vocab=256, context=16, batch=4),
    },
}

MODELS = tuple(SHAPES["full"])


class Uneven(GPT):
    """A GPT whose blocks are of inner widths from once to eight times the model's, growing evenly."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        for i, block in enumerate(self.blocks):
            inner = round(config.width * (1 + 7 * i / max(config.layers - 1, 1)))
            block.up, block.down = nn.Linear(config.width, inner), nn.Linear(inner, config.width)
            block.apply(self._init)


def build(shape: Shape) -> Any:
    """The model with random weights, in training."""
    if shape.kind == "llama":
        from transformers import LlamaForCausalLM

        model: Any = LlamaForCausalLM(llama_config(shape))
        return model.train()
    config = GPTConfig(
        vocab=shape.vocab, context=shape.context, layers=shape.layers, heads=shape.heads, width=shape.width
    )
    return {"gpt": GPT, "uneven": Uneven}[shape.kind](config)


def llama_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=round(shape.width * 8 / 3 / 64) * 64 or 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        use_cache=False,
    )


def inputs(shape: Shape, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the whole model is called with for tokens ``x`` and those that follow them, ``y``: int64[batch, context]."""
    if shape.kind == "llama":
        return {"input_ids": x, "labels": x}  # it moves them by one itself
    return {"tokens": x, "targets": y}


def loss_of(answer: Any) -> torch.Tensor:
    """Of what the whole model answered."""
    return answer if isinstance(answer, torch.Tensor) else answer.loss


# -- in pieces


@dataclass(frozen=True)
class Pieces:
    """``first`` makes activations of tokens and ``last`` logits of activations. ``layers`` makes one module of some of the
    layers between. ``loss`` takes logits and targets, which are the ``target``-th of a batch's ``(x, y)``."""

    first: nn.Module
    count: int
    layers: Callable[[Sequence[int]], nn.Module]
    last: nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    target: int

    def stage(self, index: int, stages: int) -> nn.Module:
        """Stage ``index`` of ``stages`` with as many layers each as can be, the first ones taking what is left over."""
        here = range(_share(self.count, index, stages), _share(self.count, index + 1, stages))
        parts = [self.first] * (index == 0) + [self.layers(here)] + [self.last] * (index == stages - 1)
        return nn.Sequential(*parts)

    def one_by_one(self) -> list[nn.Module]:
        """What a list of layers wants."""
        return [self.first, *(self.layers([i]) for i in range(self.count)), self.last]


def _share(count: int, index: int, stages: int) -> int:
    return index * (count // stages) + min(index, count % stages)


def pieces(model: Any) -> Pieces:
    """The same modules as in the model, from :func:`build`."""
    if isinstance(model, GPT):
        blocks = model.blocks
        return Pieces(
            first=_Embeddings(model),
            count=len(blocks),
            layers=lambda which: nn.Sequential(*(blocks[i] for i in which)),
            last=nn.Sequential(model.norm, model.head),
            loss=_cross_entropy,
            target=1,
        )
    layers, vocabulary = model.model.layers, model.config.vocab_size
    return Pieces(
        first=model.model.embed_tokens,
        count=len(layers),
        layers=lambda which: _Decoder([layers[i] for i in which], model.model.rotary_emb),
        last=nn.Sequential(model.model.norm, model.lm_head),
        loss=lambda logits, labels: model.loss_function(logits, labels, vocabulary),
        target=0,
    )


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class _Embeddings(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.tokens, self.positions = model.tokens, model.positions

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class _Decoder(nn.Module):
    """Layers of a Llama, which all want the same rotations; without a mask they are causal."""

    def __init__(self, layers: Sequence[nn.Module], rotary: nn.Module) -> None:
        super().__init__()
        self.layers, self.rotary = nn.ModuleList(layers), rotary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rotations = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=rotations)
        return x


def resized(shape: Shape, batch: int | None, context: int | None) -> Shape:
    """With another batch or context where one is asked for."""
    return replace(shape, batch=batch or shape.batch, context=context or shape.context)
