"""``python -m benchmarks zero``: figures beside those of peers, measured in turns in one call."""

from __future__ import annotations

import argparse

from benchmarks import zero
from benchmarks.subjects import SUBJECTS
from examples.gpt import PRESETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "zero", help=zero.__doc__, description=zero.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    one.add_argument("--preset", choices=PRESETS, default="12m", help="model size")
    one.add_argument("--ranks", type=int, default=2, help="processes of each subject")
    one.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    one.add_argument("--steps", type=int, default=1, help="steps of a subject in one round")
    one.add_argument("--batch", type=int, default=6, help="samples of one rank")
    one.add_argument("--context", type=int, default=256, help="bytes of a sample")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    one.add_argument("--only", default="", help=f"subjects, with commas between: {', '.join(SUBJECTS)}")
    one.add_argument("--out", default="benchmarks/results", help="where the table and the figures are written")
    one.set_defaults(run=zero.run)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
