"""The Hugging Face Trainer with ZeRO-3: ``torchrun --nproc_per_node 2 -m examples.trainer``, from a checkout or installed."""

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from dspass.integrations import Trainer  # transformers.Trainer, without DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="out/trainer")
    parser.add_argument("--resume", help="a checkpoint's folder, written by any number of processes")
    args = parser.parse_args()

    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = [{"input_ids": row, "labels": row} for row in text[: 64 * 400].view(400, 64)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.folder,
            use_cpu=not torch.cuda.is_available(),
            max_steps=args.steps,
            per_device_train_batch_size=4,  # each process has batches of its own
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            max_grad_norm=1.0,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=args.steps,
            save_steps=args.steps // 2,
            report_to=[],
        ),
        train_dataset=rows[:-16],
        eval_dataset=rows[-16:],
        config={"zero_optimization": {"stage": 3}},
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()  # on every process; LlamaForCausalLM.from_pretrained(args.folder) reads it


if __name__ == "__main__":
    main()
