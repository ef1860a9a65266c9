"""``python -m benchmarks zero`` and ``memory``: figures beside those of peers, measured in turns in one call."""

from __future__ import annotations

import argparse
import sys

from benchmarks import memory, zero
from benchmarks.subjects import SUBJECTS
from examples.gpt import PRESETS


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
    memory.add_arguments(two)
    two.set_defaults(run=memory.run)
    options = parser.parse_args()
    if options.command == "memory":
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


if __name__ == "__main__":
    sys.exit(main())
