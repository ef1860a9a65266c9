"""Train a small GPT on real text with ZeRO, from a plain loop, and print what happened.

torchrun --nproc_per_node 2 -m examples.train_gpt
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import dspass  # from a checkout only: once installed, torch.compile finds the backend by itself
from dspass.report import format_bytes
from examples.gpt import GPT, PRESETS, batches, text_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="12m", help="model size (default 12m)")
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="ZeRO stage (default 3)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps (default 60)")
    parser.add_argument("--batch", type=int, default=4, help="samples of one rank (default 4)")
    parser.add_argument("--context", type=int, default=128, help="bytes of one sample (default 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 0.001)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the report goes (default out)")
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    torch.manual_seed(0)
    data = batches(text_corpus(), options.batch, options.context, seed=0, rank=rank)

    model = GPT(PRESETS[options.preset]).to(device)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(
            f"GPT, {count / 1e6:.1f} M parameters, ZeRO stage {options.stage} on {dist.get_world_size()} processes; "
            "the first two steps compile",
            flush=True,
        )
    original = model
    model = torch.compile(model, backend="deepspeed", options={"zero_optimization": {"stage": options.stage}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    def step() -> torch.Tensor:
        x, y = next(data)
        loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses: list[float] = []
    seconds: list[float] = []
    tokens = options.batch * options.context * dist.get_world_size()
    bar = tqdm(range(options.steps), disable=rank != 0, unit="step", ncols=100)
    for number in bar:
        begin = time.perf_counter()
        # The first call holds the whole model once; the report says how much that was.
        with dspass.measure(original) if number == 0 else contextlib.nullcontext():
            losses.append(_mean(step()))
        seconds.append(time.perf_counter() - begin)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", **{"tokens/s": f"{tokens / seconds[-1]:,.0f}"})

    with dspass.measure(original):
        step()
    report = dspass.explain(original)
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, report.memory.peak_bytes)
    failed = False
    if rank == 0:
        first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        steady = sorted(seconds[2:])[len(seconds[2:]) // 2]
        print(f"\nloss            {first:.3f} -> {last:.3f} (means of the first and the last five steps)")
        print(
            f"tokens/s        {tokens / steady:,.0f} "
            f"(median step {steady * 1e3:.0f} ms; compiling took {sum(seconds[:2]):.0f} s)"
        )
        for number, peak in enumerate(peaks):
            print(f"peak of rank {number}  {format_bytes(peak)}, measured")
        print(
            f"sent a step     {format_bytes(report.traffic_bytes)} by each rank, "
            f"in {sum(t.calls for t in report.traffic)} collectives\n"
        )
        print(report)
        for name in ("report.html", "report.json"):
            report.save(options.out / name)
        print(f"\nwritten: {options.out / 'report.html'} (open it in a browser) and {options.out / 'report.json'}")
        failed = not last < first
        if failed:
            print("the loss did not fall")
    dist.destroy_process_group()
    raise SystemExit(int(failed))


def _mean(loss: torch.Tensor) -> float:
    """The loss over all ranks' batches."""
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


if __name__ == "__main__":
    main()
