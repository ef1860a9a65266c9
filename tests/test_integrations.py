"""The Trainer and Accelerate beside a sharded model, on real ranks, against the plain libraries in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import run

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parent.parent
VOCABULARY, LENGTH = 61, 12


def zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 40} if stage == 3 else {})},
        "dspass": {"bucket_bytes": "1GB"},  # few segments: a compiler is started for each
    }


def model_of(name: str, seed: int = 0) -> Any:
    """A real architecture at a small size, without dropout."""
    import transformers

    torch.manual_seed(seed)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


def samples(number: int, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (number, LENGTH), generator=random)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def _fresh() -> None:
    """Accelerate keeps its state for the life of a process; ranks live from test to test."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(folder: str, batch: int, **more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        learning_rate=1e-2, lr_scheduler_type="linear", max_grad_norm=0.5, logging_steps=1, report_to=[], disable_tqdm=True,
        **{"max_steps": 6, "save_strategy": "no", **more},
    )  # fmt: skip


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(
    folder: str, stage: int | None, *, name: str = "gpt2", batch: int = 2, by_hand: bool = False,
    resume: str | None = None, seed: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train with the Trainer: the plain one where ``stage`` is None, else ours."""
    import transformers

    from dspass.integrations import Trainer

    _fresh()
    model = model_of(name, seed)
    if stage is None:
        make: Any = transformers.Trainer
    elif by_hand:
        model.compile(backend="deepspeed", options=zero(stage))
        make = Trainer
    else:
        make = lambda **kwargs: Trainer(config=zero(stage), **kwargs)  # noqa: E731
    args = arguments(folder, batch, **more)
    trainer = make(model=model, args=args, train_dataset=samples(40), eval_dataset=samples(7, seed=4))
    before = trainer.evaluate()["eval_loss"] if not by_hand and resume is None else None
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()["eval_loss"]
    return {
        "losses": logged(trainer, "loss"),
        "norms": logged(trainer, "grad_norm"),
        "evaluated": [before, after],
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "class": type(trainer.model_wrapped).__name__,
    }


if __name__ == "__main__":
    import tempfile
    import time

    with tempfile.TemporaryDirectory() as d:
        t = time.time()
        print(trained(d + "/a", None, batch=4), time.time() - t)
        t = time.time()
        print(run(2, trained, d + "/b", 3)[0], time.time() - t)
        t = time.time()
        print(run(2, trained, d + "/b", 3, by_hand=True)[0], time.time() - t)
