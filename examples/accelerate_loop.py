"""A loop with Accelerate and ZeRO-3: ``torchrun --nproc_per_node 2 -m examples.accelerate_loop``."""

import argparse
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dspass.integrations import Accelerator  # accelerate.Accelerator, without DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="out/accelerate")
    parser.add_argument("--resume", help="a folder of save_state, written by any number of processes")
    args = parser.parse_args()

    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = [{"input_ids": row, "labels": row} for row in text[: 64 * 400].view(400, 64)]
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=2,
        config={"zero_optimization": {"stage": 3}},
    )
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    train, test = DataLoader(rows[:-15], batch_size=4, shuffle=True), DataLoader(rows[-15:], batch_size=4)
    model, optimizer, train, test, schedule = accelerator.prepare(model, optimizer, train, test, schedule)
    if args.resume:
        accelerator.load_state(args.resume)

    model.train()
    for _, batch in zip(range(2 * args.steps), train, strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.4f}")
    accelerator.save_state(args.folder)  # on every process, as the next three

    model.eval()
    losses = []
    for batch in test:  # padded to whole batches: each process has as many
        with torch.no_grad():
            logits = model(**batch).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none").mean(1)
        losses.append(accelerator.gather_for_metrics(each))  # and without the padding again: 15 rows
    accelerator.print(f"evaluated {len(torch.cat(losses))} rows: loss {torch.cat(losses).mean().item():.4f}")
    whole = accelerator.get_state_dict(model)  # gathered on rank 0
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.folder, state_dict=whole)
    accelerator.end_training()


if __name__ == "__main__":
    main()
