"""``python -m benchmarks zero``: dspass stages 0 to 3 beside DDP, FSDP2, Inductor and DeepSpeed, in turns, in one call.

All subjects stay alive, one of them steps at a time, and their order changes every round, so that a ratio compares steps of
the same moment. Where not all fit into memory they run in several turns, each beside the same references.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import table
from benchmarks.measure import loopback_bytes
from benchmarks.peers import deepspeed_python
from benchmarks.subjects import REFERENCES, SUBJECTS
from benchmarks.workers import Group, SubjectFailed

GIB = 1 << 30
_DEEPSPEED = ("deepspeed-zero3", "deepspeed-zero3-compile")

Result = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    names = options.only.split(",") if options.only else [n for n, s in SUBJECTS.items() if s.usual]
    unknown = [n for n in names if n not in SUBJECTS]
    if unknown:
        print(f"no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    bench = Bench(options)
    if not options.only or set(names) & set(_DEEPSPEED):
        bench.python, said = deepspeed_python(options.deepspeed_python, options.with_deepspeed)
        bench.notes.append(f"DeepSpeed: {said}.")
        if bench.python and not options.only:
            names += list(_DEEPSPEED)
        if not bench.python:
            names = [n for n in names if n not in _DEEPSPEED]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the groups are closed then, too
    try:
        bench.measure_all(names)
    except KeyboardInterrupt:
        bench.notes.append("Stopped by hand; what was measured until then is shown.")
    finally:
        bench.close()
    found = bench.found()
    text = table.report(found)
    print(text)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"zero-{options.preset}-{options.device}-b{options.batch}"
    (folder / f"{stem}.md").write_text(text + "\n")
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {folder / stem}.md and {folder / stem}.json")
    return int(any("error" in r for r in bench.results.values()))


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = {k: getattr(options, k) for k in ("preset", "batch", "context", "device")}
        self.results: dict[str, Result] = {}
        self.groups: dict[str, Group] = {}
        self.notes: list[str] = []
        self.python: str | None = None
        self.most = 0  # bytes that a subject took at most so far
        self.round = 0
        self.begin = time.time()
        self.limit = min(options.memory_gib * GIB, int(_available() * 0.9))

    def measure_all(self, names: list[str]) -> None:
        """One turn after another until every subject has had its rounds; most runs need one."""
        waiting = sorted(names, key=lambda n: n not in REFERENCES)
        if "inductor" in waiting:
            waiting.remove("inductor")
            self._attempt("inductor", self._compile_only)
        turns = 0
        while waiting:
            turns += 1
            fresh = self._start_some(waiting)
            for _ in tqdm(range(self.options.rounds), desc="interleaved rounds", unit="round", ncols=90):
                order = list(self.groups)
                random.Random(self.round).shuffle(order)
                for name in order:
                    self._attempt(name, self._one_round)
                self.round += 1
            for name in tqdm(
                [n for n in fresh if n in self.groups], desc="memory and traffic", unit="subject", ncols=90
            ):
                self._attempt(name, self._watch)
            for name in [n for n in self.groups if n not in REFERENCES]:
                self.groups.pop(name).close()
        if turns > 1:
            self.notes.append(
                f"Not all fit into {self.limit / GIB:.0f} GiB: {turns} turns, each beside the references."
            )

    def _start_some(self, waiting: list[str]) -> list[str]:
        """Start and compile subjects while memory lasts, one at least."""
        fresh: list[str] = []
        bar = tqdm(total=len(waiting), desc="start and compile", unit="subject", ncols=90)
        while waiting:
            if any(n in self.groups and n not in REFERENCES for n in fresh) and not self._room():
                break
            name = waiting.pop(0)
            bar.set_postfix_str(name)
            self._attempt(name, self._start)
            fresh.append(name)
            bar.update()
        bar.close()
        return fresh

    def _room(self) -> bool:
        if self.options.device != "cpu":
            return True
        held = 0
        for group in self.groups.values():
            now, most = group.memory()
            held, self.most = held + now, max(self.most, most)
        return held + self.most <= self.limit

    def _attempt(self, name: str, work: Any) -> None:
        """A subject that fails is reported and ended; the others go on."""
        try:
            work(name)
        except SubjectFailed as error:
            self.results.setdefault(name, {"seconds": {}, "losses": []})["error"] = str(error)
            tqdm.write(f"failed: {SubjectFailed.short(str(error))}", file=sys.stderr)
            if name in self.groups:
                self.groups.pop(name).close()

    def _compile_only(self, name: str) -> None:
        self._start(name)
        self.results[name]["saved_bytes"] = self.groups[name].ask("saved", timeout=300)[0]
        self.groups.pop(name).close()

    def _start(self, name: str) -> None:
        group = Group(name, self.options.ranks, self.settings, self.python if name in _DEEPSPEED else None)
        self.groups[name] = group
        result = self.results[name] = {"wrapped": SUBJECTS[name].how, "seconds": {}, "losses": [], "interface": []}
        result["versions"] = group.ask("versions", timeout=600)[0]  # imports, builds and wraps the model
        spent = []
        for _ in range(3):
            answers = group.ask("steps", 1, timeout=900)
            spent.append(max(a[0] for a in answers))
            result["losses"].append(_mean(answers))
        result["first_steps_seconds"] = spent
        result["compile_seconds"] = max(spent[0] + spent[1] - 2 * spent[2], 0.0)

    def _one_round(self, name: str) -> None:
        before = loopback_bytes()
        answers = self.groups[name].ask("steps", self.options.steps, timeout=600)
        result = self.results[name]
        result["interface"].append((loopback_bytes() - before) / self.options.steps / self.options.ranks)
        result["seconds"][self.round] = max(a[0] for a in answers)
        if self.options.steps == 1:
            result["losses"].append(_mean(answers))
        else:
            result["losses"] += [sum(step) / len(step) for step in zip(*(a[1] for a in answers), strict=True)]

    def _watch(self, name: str) -> None:
        group, result = self.groups[name], self.results[name]
        kept = group.ask("persistent")
        # Eager peers' peaks differ from step to step by what the allocator of a collective's thread does: the median of three.
        three = sorted((group.ask("watch", 2) for _ in range(3)), key=lambda w: max(one["peak"] for one in w))
        watched = three[1]
        result["persistent"] = max(kept, key=lambda k: sum(k.values()))
        result["persistent_bytes"] = sum(result["persistent"].values())
        result["peak_bytes"] = max(w["peak"] for w in watched)
        result["peaks_bytes"] = [max(one["peak"] for one in w) for w in three]
        result["saved_bytes"] = max(w.get("saved", 0) for w in watched)
        result["live_bytes"] = max(w["live"] for w in watched)
        result["collectives"] = watched[0]["collectives"]
        result["collectives_outside"] = watched[0].get("counted_outside", {})
        # The least of the rounds: what other processes send over the interface only adds.
        result["interface_bytes"] = min(result["interface"]) if result["interface"] else None

    def found(self) -> dict[str, Any]:
        """All that is written to the JSON file, and all that the table is made of."""
        import torch

        return {
            "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
            "settings": self.settings | {k: getattr(self.options, k) for k in ("ranks", "rounds", "steps")},
            "device": table.device(self.options.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "minutes": (time.time() - self.begin) / 60,
            "date": time.strftime("%Y-%m-%d"),
            "notes": self.notes,
            "medians": {n: statistics.median(r["seconds"].values()) for n, r in self.results.items() if r["seconds"]},
            "results": self.results,
        }

    def close(self) -> None:
        for group in self.groups.values():
            group.close()


def _mean(answers: list[Any]) -> float:
    """The ranks' mean loss of one step."""
    return sum(a[1][0] for a in answers) / len(answers)


def _available() -> int:
    table_ = Path("/proc/meminfo")
    for line in table_.read_text().splitlines() if table_.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
