"""A stage's backward as it runs: in one piece or in two, each gradient answered or added to those of other micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from dspass.lowering.add_gradients import add_gradients
from dspass.lowering.segments import lower
from dspass.lowering.split_backward import Halves, Literal, outputs_of, split, whole
from dspass.runtime import compat
from dspass.runtime.program import Probe, Program, boxed


class StageBackward:
    """The compiled backward of a graph of so many ``inputs``. It is in two halves, which run together or apart, where those
    inputs are said, ``activations``, whose gradients are wanted first. The gradients of ``adds`` are added to sums where what
    makes them can (:mod:`dspass.lowering.add_gradients`); inputs are told by position.

    :meth:`boxed` stands where AOTAutograd expects a compiled backward. By itself it runs both halves and answers all
    gradients. Inside of :meth:`deferred` it answers those of activations, and :meth:`weights` the others later. For these it
    answers None meanwhile, which leaves ``.grad`` alone; where AOTAutograd insists on a tensor, for what is inside of a
    DTensor, zeros of no memory. ``torch.autograd.grad`` for the gradients of activations drops either. None stands for what
    was added to a sum, too: each run stands inside of :meth:`adding`, which says where the sums are.

    An attribute says which it is, no context variable: on a GPU autograd runs backwards in threads of its own.
    """

    def __init__(self, inputs: int, activations: Collection[int] | None, adds: Collection[int] = ()) -> None:
        self.inputs, self.adds = inputs, frozenset(adds)
        self.activations = None if activations is None else frozenset(activations)
        self.added: tuple[int, ...] = ()
        """Of ``adds`` those that are, in the order in which W reads their sums."""
        self.halves: Halves | None = None
        self.programs: dict[str, Program] = {}
        self._names: tuple[str, ...] = ()  # of the whole backward's inputs
        self._reads: dict[str, tuple[str, ...]] = {}  # of these, what each half reads
        self._places: dict[int, int] = {}  # of a gradient among the outputs, its input's
        self._inside: dict[int, torch.Tensor] = {}  # what a gradient inside of a DTensor is like
        self._waiting: dict[Hashable, tuple[list[Any], list[int]]] = {}
        self._deferred = False
        self._token: Hashable = None
        self._total_of: Callable[[int], torch.Tensor] | None = None

    @property
    def _rest(self) -> str:
        """Names the program that runs last, or alone."""
        return "weight" if self.is_split else "backward"

    @property
    def is_split(self) -> bool:
        return self.activations is not None

    def anew(self) -> StageBackward:
        """Another of the same graph, that has not been lowered."""
        return StageBackward(self.inputs, self.activations, self.adds)

    def lower(
        self,
        gm: fx.GraphModule,
        compiler: Callable[..., Any],
        *,
        probe: Probe | None = None,
        order: Callable[[int], Iterable[int]] = range,
    ) -> None:
        """Compile ``gm``, the backward graph that AOTAutograd made. For the rest see
        :func:`dspass.lowering.segments.lower`."""
        gradients = gradients_of(gm.graph)
        outputs = outputs_of(gm.graph)
        if self.activations is None:
            halves = self.halves = whole(gm)
        else:
            is_first = [g is None or g.of in self.activations for g in gradients]
            halves = self.halves = split(gm, [i for i, yes in enumerate(is_first) if yes])
        self._names = tuple(n.name for n in gm.graph.find_nodes(op="placeholder"))
        self._places = {i: g.of for i, g in enumerate(gradients) if g is not None}
        self._inside = {i: outputs[i].meta["val"] for i in halves.rest if (g := gradients[i]) is not None and g.is_part}
        totals: dict[int, str] = {}
        if halves.weight is not None:
            can = {
                j: g.of for j, i in enumerate(halves.rest) if (g := gradients[i]) is not None and i not in self._inside
            }
            totals = add_gradients(halves.weight.graph, [j for j, of in can.items() if of in self.adds])
            halves.weight.recompile()
            self.added = tuple(can[j] for j in totals)
        for name, half in (("input", halves.input), (self._rest, halves.weight)):
            if half is None:
                continue
            read = (n.name for n in half.graph.find_nodes(op="placeholder"))
            apart = {*halves.carried, *totals.values()}
            self._reads[name] = tuple(n for n in read if n not in apart)
            program = lower(half, compiler, is_backward=True, is_inference=False, probe=probe, order=order)
            kinds = {**program.categories, **dict.fromkeys(halves.carried, "saved")}
            kinds |= dict.fromkeys(totals.values(), "gradients")
            # Only what begins a backward is given gradients that autograd has made.
            begins = name == "input" or halves.input is None
            self.programs[name] = replace(program, categories=kinds, is_backward=begins)

    @contextlib.contextmanager
    def deferred(self, token: Hashable = None) -> Iterator[None]:
        """Inside, a backward answers the gradients of activations only; the others wait, in turn, or under ``token``, such as
        the number of a micro-batch."""
        before = self._deferred, self._token
        self._deferred, self._token = True, token
        try:
            yield
        finally:
            self._deferred, self._token = before

    @contextlib.contextmanager
    def adding(self, total_of: Callable[[int], torch.Tensor]) -> Iterator[None]:
        """Inside, gradients are added to what ``total_of`` answers for an input's position: contiguous tensors like it."""
        before, self._total_of = self._total_of, total_of
        try:
            yield
        finally:
            self._total_of = before

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """The tokens of weight gradients that wait, the oldest first."""
        return tuple(self._waiting)

    def weights(self, token: Hashable = None) -> list[torch.Tensor | None]:
        """The gradients of one backward that waited, the oldest or that of ``token``, each at the place of its input of the
        graph that was compiled; None where an input has none, has had it, or where it was added. Of a DTensor the local part.

        Raises ``LookupError`` where none waits, or none of that token, and ``RuntimeError`` where something has been changed in
        place that they are made of: autograd watches saved tensors until the backward, which was long ago.
        """
        if token is None and self._waiting:
            token = next(iter(self._waiting))
        if token not in self._waiting:
            known = f"those of {list(self._waiting)} do" if self._waiting else "none do"
            raise LookupError(
                f"no weight gradients wait under {token!r}, {known}: run the backward inside of deferred(...) first, and "
                "ask once for each."
            )
        held, versions = self._waiting.pop(token)
        if versions != _versions(held):
            names = (*self.halves.carried, *self._reads[self._rest]) if self.halves is not None else ()
            changed = [n for n, *both in zip(names, versions, _versions(held), strict=True) if both[0] != both[1]]
            raise RuntimeError(
                f"{changed} of the backward graph changed in place between a backward and its weight gradients, which would be "
                "wrong: give each micro-batch tensors of its own, and step the optimiser behind weights()."
            )
        with compat.without_autocast(), self._watched():
            answers = self._weights(held)
        found: list[torch.Tensor | None] = [None] * self.inputs
        for position, value in answers.items():
            found[self._places[position]] = value
        return found

    def drop(self) -> None:
        """Let go of all that waits, as after a step that failed half-way."""
        self._waiting.clear()

    def boxed(self) -> Callable[[list[Any]], tuple[Any, ...]]:
        """This backward for AOTAutograd."""
        return boxed(self)

    def __call__(self, arguments: list[Any]) -> tuple[Any, ...]:
        """Of the whole graph's inputs, a list that is emptied, its outputs."""
        halves = self.halves
        assert halves is not None, "a backward ran before it was compiled"
        token = object() if self._token is None else self._token
        if self._deferred and token in self._waiting:
            raise RuntimeError(
                f"weight gradients of an earlier backward wait under {token!r}: take them with weights({token!r}) first, "
                "or give each backward its own token."
            )
        values = dict(zip(self._names, arguments, strict=True))
        arguments.clear()
        answers: dict[int, Any] = {i: o.value if isinstance(o, Literal) else values[o] for i, o in halves.given.items()}
        held = [values[name] for name in self._reads.get(self._rest, ())]
        if halves.input is not None:
            given = [values[name] for name in self._reads["input"]]
            values.clear()
            results = self.programs["input"](given)
            count = len(halves.first)
            answers |= zip(halves.first, results[:count], strict=True)
            held = [*results[count:], *held]
            del results
        values.clear()
        if self._deferred:
            self._waiting[token] = held, _versions(held)
            answers |= {i: self._zeros(i) for i in halves.rest}
        else:
            answers |= self._weights(held)
        return tuple(answers[i] for i in range(halves.outputs))

    def _weights(self, held: list[Any]) -> dict[int, Any]:
        """Run W; its outputs by position. Empties ``held``."""
        assert self.halves is not None
        if self.halves.weight is None:
            return {}
        if self.added:
            assert self._total_of is not None, "a backward that adds gradients ran outside of adding()"
            held += map(self._total_of, self.added)
        return dict(zip(self.halves.rest, self.programs[self._rest](held), strict=True))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What runs inside is part of the backward, though autograd does not run it."""
        weight = self.programs.get(self._rest)
        ledger = None if weight is None else weight.probe.ledger
        if ledger is None:
            yield
            return
        before = ledger.phase
        ledger.mark("weight gradients", "backward")
        try:
            yield
        finally:
            ledger.mark(ledger.label, before)

    def _zeros(self, position: int) -> torch.Tensor | None:
        like = self._inside.get(position)
        return None if like is None else torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _versions(held: Sequence[Any]) -> list[int]:
    """Each changes when the tensor is changed in place; those of inference mode have none."""
    return [v._version if isinstance(v, torch.Tensor) and not v.is_inference() else 0 for v in held]


def gradients_of(backward: fx.Graph) -> list[compat.Gradient | None]:
    """Of each output of a backward graph that AOTAutograd made, which input of the compiled graph it is the gradient of; None
    where it is none of a tensor, such as the mesh of a DTensor."""
    said = backward.find_nodes(op="output")[0].meta.get("desc")
    assert said is not None, "AOTAutograd says what each output is"
    return [
        compat.gradient(desc)
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
        else None
        for value, desc in zip(outputs_of(backward), said, strict=True)
    ]
