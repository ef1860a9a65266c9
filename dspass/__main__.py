"""``python -m dspass``: what is here. ``python -m dspass explain``: predict a model named on the command line.
``python -m dspass calibrate``: measure this device. ``python -m dspass kernels``: compile kernels."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

EXPLAIN_HELP = """\
predict memory, traffic and the passes' work for a model, without a GPU and without running it

the model is one of
  package.module:function         answers (model, args) or (model, args, kwargs)
  transformers:CONFIG_CLASS       a configuration class of transformers, with --set for its fields; a causal language
                                  model on the meta device, and a batch of --batch x --sequence tokens

examples
  python -m dspass explain transformers:LlamaConfig --set vocab_size=128256 hidden_size=4096 intermediate_size=14336 \\
      num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8 dtype=bfloat16 --sequence 8192 --world-size 8 \\
      --device h100 --memory-budget 30GB
  python -m dspass explain examples.gpt:sample --config ds_config.json --world-size 2 --save report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dspass", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    explain = commands.add_parser(
        "explain",
        help="predict a model",
        description=EXPLAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("model", help="package.module:function or transformers:CONFIG_CLASS")
    explain.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the configuration class"
    )
    explain.add_argument("--batch", type=int, default=1, help="samples of one rank (default 1)")
    explain.add_argument("--sequence", type=int, default=1024, help="tokens of a sample (default 1024)")
    explain.add_argument("--config", help="a DeepSpeed JSON file (default: $DSPASS_CONFIG, else stage 3)")
    explain.add_argument("--world-size", type=int, default=8, help="ranks (default 8)")
    explain.add_argument("--device", default=None, help="cpu or a GPU's name, such as h100 (default cpu)")
    explain.add_argument(
        "--memory-budget", help='the most that a rank may hold: bytes, "60GB", "75%%" of the device or "auto"'
    )
    explain.add_argument("--optimizer", default="adamw", help="whose states are counted (default adamw)")
    explain.add_argument("--forward-only", action="store_true", help="predict inference")
    explain.add_argument("--save", nargs="*", default=[], metavar="FILE", help="also write report.html or report.json")
    calibrate = commands.add_parser(
        "calibrate",
        help="measure the device that is here, for the planner",
        description="Measure products, attention, generated kernels, links and copies on the device that is here, and store "
        "the figures where the planner and explain find them ($DSPASS_DEVICES, else dspass/devices in the user's cache). "
        "On a CPU with as many threads as OMP_NUM_THREADS says, of one rank and of several that share it, which takes two "
        "minutes; start it with torchrun to measure a group's links.",
    )
    calibrate.add_argument(
        "--ranks",
        type=int,
        help="processes of this CPU that measure beside each other, and gathers between them (default: 1, and then 2)",
    )
    compile_kernels = commands.add_parser(
        "kernels",
        help="compile the kernels for a GPU",
        description="Compile the CUDA kernels, or with ROCm's torch the HIP ones, and their binding to torch, unless they are "
        "there; print where they are. Needs nvcc or hipcc, and g++. See docs/kernels.md.",
    )
    compile_kernels.add_argument(
        "--cutlass", action="store_true", help="those of CUTLASS too: minutes, and up to 5 GB a unit, two at a time"
    )
    options = parser.parse_args(argv)
    if options.command is None:
        return _environment()
    run = {"explain": _explain, "calibrate": _calibrate, "kernels": _kernels}[options.command]
    try:
        return run(options)
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        print(f"dspass {options.command}: {error}", file=sys.stderr)
        return 2


def _calibrate(options: argparse.Namespace) -> int:
    from dspass.calibrate import main as measured

    measured(options.ranks)
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from dspass.runtime import kernels

    if options.cutlass and torch.version.hip:
        raise ValueError("CUTLASS's kernels are for NVIDIA's GPUs, and this torch is ROCm's: leave --cutlass out.")
    targets = ["hip" if torch.version.hip else "cuda", "binding", *(["cutlass"] if options.cutlass else [])]
    for target in targets:
        print(f"{target}: {kernels.build(target, lambda line: print(f'  {line}', flush=True))}", flush=True)
    return 0


def _environment() -> int:
    import dspass  # noqa: F401  (registers the backend)
    from dspass.environment import describe

    for section, rows in describe():
        print(section)
        for name, value in rows:
            print(f"  {name:<28} {value}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    import dspass

    model, args, kwargs = _model(options)
    report = dspass.explain(
        model,
        *args,
        kwargs=kwargs,
        config=options.config,
        world_size=options.world_size,
        device=options.device,
        memory_budget=options.memory_budget,
        optimizer=options.optimizer,
        train=not options.forward_only,
    )
    print(report)
    for path in options.save:
        report.save(path)
        print(f"written: {path}")
    return 0


def _model(options: argparse.Namespace) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    module, _, name = options.model.partition(":")
    if not name:
        raise ValueError(
            f"{options.model!r} names no model: write package.module:function or transformers:LlamaConfig."
        )
    if module == "transformers":
        return _language_model(name, options)
    sys.path.insert(0, "")
    answer = getattr(importlib.import_module(module), name)()
    if not isinstance(answer, tuple) or not isinstance(answer[0], torch.nn.Module):
        raise ValueError(
            f"{options.model} answered {type(answer).__name__}; it must answer (model, args) or (model, args, kwargs)."
        )
    return answer[0], tuple(answer[1]), dict(answer[2]) if len(answer) > 2 else {}


def _language_model(name: str, options: argparse.Namespace) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    import ast

    import transformers

    fields: dict[str, Any] = {}
    for item in options.set:
        key, separator, text = item.partition("=")
        if not separator:
            raise ValueError(f"--set {item!r}: write FIELD=VALUE.")
        try:
            fields[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            fields[key] = text
    config = getattr(transformers, name)(**{"use_cache": False, **fields})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(options.batch, options.sequence, dtype=torch.long)
    return model, (), {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    raise SystemExit(main())
