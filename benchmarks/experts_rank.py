"""One rank of ``python -m benchmarks experts``: a mixture of experts from ``transformers``, as it is, random weights.

Started by :mod:`benchmarks.workers` as ``python -m benchmarks.experts_rank FD``, perhaps by another Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.rank import Rank
from benchmarks.workers import serve


@dataclass(frozen=True)
class Shape:
    """A model of ``kind``, ``mixtral`` or ``qwen3_moe``; ``inner`` is the width inside of one expert."""

    kind: str
    hidden: int
    inner: int
    layers: int
    experts: int
    top_k: int


#: Mixtral 8x7B divided by 8 in width, Qwen3 30B-A3B by 4 and with half of its experts, three layers each, so
#: that all ways fit beside each other; and one for tests.
PRESETS = {
    "mixtral": Shape("mixtral", 512, 1792, 3, 8, 2),  # 68.3 M parameters
    "qwen3": Shape("qwen3_moe", 512, 192, 3, 64, 8),  # 59.0 M
    "tiny": Shape("mixtral", 32, 48, 1, 4, 2),
}


def build(shape: Shape) -> Any:
    """The model, its decoder layers as a plain list in ``blocks``, so that no parameter has two names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {
        "mixtral": {"num_local_experts": shape.experts, "intermediate_size": shape.inner},
        "qwen3_moe": {"num_experts": shape.experts, "moe_intermediate_size": shape.inner},
    }
    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=256,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=shape.hidden // 8,
        num_experts_per_tok=shape.top_k,
        use_cache=False,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        **own[shape.kind],
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    model.train()
    model.blocks = list(model.model.layers)
    return model


class ExpertsRank(Rank):
    """Every public method is a request."""

    def _build(self, preset: str) -> Any:
        return build(PRESETS[preset])

    def _loss(self, x: Any, y: Any) -> Any:
        return self.training.forward(input_ids=x, labels=x).loss  # it moves them by one itself

    def routing(self) -> list[list[int]]:
        """Of each layer the rows of the last step for each expert, of all ranks; empty where experts are not divided."""
        from dspass.engines import engine_of

        engine = engine_of(self.model)
        return [] if engine is None else [layer.counts.sum(0).tolist() for layer in engine.routing.last.values()]


if __name__ == "__main__":
    serve(ExpertsRank)
