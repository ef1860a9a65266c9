"""``python -m benchmarks zero``, ``memory``, ``offload``, ``quantise``, ``experts``, ``pipeline`` and ``weights``: figures
measured in turns in one call, beside those of peers where there are any; ``prefetch``: what is predicted for a device;
``kernels``: operator by operator; ``solver`` and ``grouped``: how long the planner's solver and products of experts take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from benchmarks import (
    experts,
    grouped,
    kernels,
    memory,
    memory_points,
    offload,
    pipeline,
    prefetch,
    quantise,
    solver,
    weights,
    zero,
)
from benchmarks.subjects import SUBJECTS
from examples.gpt import PRESETS

_COMMAS = "with commas between"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = (zero.__doc__ or "").splitlines()[0]
    one = commands.add_parser(
        "zero", help=summary, description=zero.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    one.add_argument("--preset", choices=PRESETS, default="12m", help="model size")
    one.add_argument("--ranks", type=_positive, default=2, help="processes of each subject")
    one.add_argument("--rounds", type=_positive, default=15, help="interleaved rounds")
    one.add_argument("--steps", type=_positive, default=1, help="steps of a subject in one round")
    one.add_argument("--batch", type=_positive, default=6, help="samples of one rank")
    one.add_argument("--context", type=_positive, default=256, help="bytes of a sample")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    one.add_argument("--only", default="", help=f"subjects, with commas between: {', '.join(SUBJECTS)}")
    one.add_argument(
        "--with-deepspeed", action="store_true", help="make .venv-deepspeed with DeepSpeed 0.19, and run it"
    )
    one.add_argument("--deepspeed-python", metavar="PATH", help="a Python that has DeepSpeed and torch")
    one.add_argument("--memory-gib", type=_positive, default=24, help="memory that all subjects may take together")
    one.add_argument("--out", default="benchmarks/results", help="where the table and the figures are written")
    one.set_defaults(run=zero.run)
    summary = (memory.__doc__ or "").splitlines()[0]
    two = commands.add_parser(
        "memory", help=summary, description=memory.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    two.add_argument("--preset", choices=memory_points.PRESETS, default="small", help="width, layers and batch")
    two.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="processes of each point")
    two.add_argument(
        "--models", type=_some_of(memory_points.MODELS), default=",".join(memory_points.MODELS), help=_COMMAS
    )
    two.add_argument(
        "--budgets", type=_several, default=20, help="points of dspass between the smallest plan and the fastest"
    )
    two.add_argument(
        "--ratios", type=_several, default=5, help="on 1 rank, points of activation_memory_budget from 1 to 0"
    )
    two.add_argument(
        "--solvers",
        type=_some_of(memory_points.SOLVERS),
        default=",".join(memory_points.SOLVERS),
        help=f"on 1 rank, of activation_memory_budget, {_COMMAS}; ilp is left out where scipy is not installed",
    )
    two.add_argument("--rounds", type=_positive, default=11, help="interleaved rounds of one step")
    two.add_argument("--jobs", type=_positive, default=2, help="points that start and compile at a time")
    two.add_argument(
        "--memory-gib", type=_positive, default=20, help="memory that points may take together; else they run in waves"
    )
    two.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the device first, which takes a minute",
    )
    two.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have glibc keep what is freed, in every process alike: else it takes it anew in each step",
    )
    two.add_argument("--out", default="benchmarks/results", help="where tables, figures and plots are written")
    two.set_defaults(run=memory.run)
    for module in (experts, grouped, kernels, offload, pipeline, prefetch, quantise, solver, weights):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").splitlines()[0]
        more = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(more)
        more.set_defaults(run=module.run)
    options = parser.parse_args()
    if options.command != "zero":
        return options.run(options)
    most = PRESETS[options.preset].context
    if options.context > most:
        parser.error(f"--context {options.context}: the model of preset {options.preset} takes {most} at most")
    if options.device == "cuda":
        import torch

        if options.ranks > torch.cuda.device_count():
            parser.error(
                f"--ranks {options.ranks} on {torch.cuda.device_count()} CUDA devices: NCCL wants one device a rank; "
                f"lower --ranks or run with --device cpu"
            )
    return options.run(options)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _several(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return value


def _some_of(names: Sequence[str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        for name in text.split(","):
            if name not in names:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(names)}")
        return text

    return checked


if __name__ == "__main__":
    sys.exit(main())
