"""Instructions in order, registers by number, each freed after its last reader: what a lowered graph runs as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dspass.runtime.clock import Clock
from dspass.runtime.ledger import Ledger


def boxed(program: Callable[[list[Any]], tuple[Any, ...]]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """``program`` as a function, marked so that AOTAutograd hands over its list of arguments and lets go of it."""

    def run(arguments: list[Any]) -> tuple[Any, ...]:
        return program(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """``run`` takes the list of its inputs and answers a sequence of its outputs. A ``boxed`` one empties the list as it
    goes, so that an input can be freed before the instruction ends."""

    label: str
    run: Callable[[list[Any]], Sequence[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    boxed: bool
    is_runtime: bool = False
    makes_host_memory: bool = False


@dataclass(eq=False)
class Probe:
    """Where a watcher is put: programs of one engine share a probe, and look into it at every instruction."""

    ledger: Ledger | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """Call it with the list of the graph's inputs; it empties that list.

    ``categories`` says what kind of memory a register holds, for those that are not just temporary.
    """

    instructions: tuple[Instruction, ...]
    size: int
    inputs: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    frees: tuple[tuple[int, ...], ...]
    unused_inputs: tuple[int, ...]
    outputs: tuple[tuple[bool, Any], ...]
    categories: Mapping[str, str]
    is_backward: bool
    probe: Probe
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def build(
        cls,
        *,
        inputs: Sequence[str],
        instructions: Sequence[Instruction],
        outputs: Sequence[Any],
        literal: Sequence[bool],
        categories: Mapping[str, str] | None = None,
        is_backward: bool = False,
        probe: Probe | None = None,
    ) -> Program:
        number: dict[str, int] = {}
        for name in [*inputs, *(n for i in instructions for n in i.outputs)]:
            number.setdefault(name, len(number))
        kept = {number[o] for o, is_literal in zip(outputs, literal, strict=True) if not is_literal}
        last: dict[int, int] = {}
        for i, instruction in enumerate(instructions):
            for name in (*instruction.outputs, *instruction.inputs):
                last[number[name]] = i
        frees: list[list[int]] = [[] for _ in instructions]
        for register, i in last.items():
            if register not in kept:
                frees[i].append(register)
        return cls(
            instructions=tuple(instructions),
            size=len(number),
            inputs=tuple(number[n] for n in inputs),
            reads=tuple(tuple(number[n] for n in i.inputs) for i in instructions),
            writes=tuple(tuple(number[n] for n in i.outputs) for i in instructions),
            frees=tuple(map(tuple, frees)),
            unused_inputs=tuple(number[n] for n in inputs if number[n] not in last and number[n] not in kept),
            outputs=tuple(
                (is_literal, o if is_literal else number[o]) for o, is_literal in zip(outputs, literal, strict=True)
            ),
            categories=categories or {},
            is_backward=is_backward,
            probe=probe or Probe(),
        )

    def boxed(self) -> Callable[[list[Any]], tuple[Any, ...]]:
        """This program for AOTAutograd."""
        return boxed(self)

    def __call__(self, arguments: list[Any]) -> tuple[Any, ...]:
        if self.is_backward and self.probe.ledger is not None:
            # Autograd makes zeros for the gradients of outputs that the loss does not use, such as a model's logits.
            self.probe.ledger.mark("gradients of outputs", "forward")
            self.probe.ledger.note(arguments)
        is_watched = self.probe.ledger is not None  # a step takes longer then
        if not is_watched:
            self.clock.start(on_gpu=any(getattr(a, "is_cuda", False) for a in arguments))
        registers: list[Any] = [None] * self.size
        for register, value in zip(self.inputs, arguments, strict=True):
            registers[register] = value
        value = None
        arguments.clear()
        for register in self.unused_inputs:
            registers[register] = None
        with torch.no_grad():
            for instruction, reads, writes, frees in zip(
                self.instructions, self.reads, self.writes, self.frees, strict=True
            ):
                taken = [registers[r] for r in reads]
                ledger = self.probe.ledger
                if ledger is not None:
                    ledger.before(instruction.label, instruction.is_runtime, instruction.makes_host_memory)
                if instruction.boxed:  # it lets go of its inputs itself, some before it ends
                    for register in frees:
                        registers[register] = None
                results = instruction.run(taken)
                del taken
                if ledger is not None:
                    ledger.after(dict(zip(instruction.outputs, results, strict=True)), self.categories)
                for register, result in zip(writes, results, strict=True):
                    registers[register] = result
                del results
                result = None
                for register in frees:
                    registers[register] = None
        if not is_watched:
            self.clock.stop()
        return tuple(o if is_literal else registers[o] for is_literal, o in self.outputs)
