"""What runs a pipeline's schedule on one rank: forwards and backwards of stages, and messages between neighbours.

One call runs all of a batch's micro-batches, forward and backward. Gradients of parameters gather in ``.grad`` of the shards
that it is given, which are leaves of its own: whoever called hands them out when the loss's own backward is asked for.

A message is a list of tensors whose names, shapes and types both ends know from the graph, so none are told. Receives are
posted where the schedule has them and waited for by what reads them. A tensor that is sent is kept until it has gone: before
the next message goes the same way, the last one must have arrived, which holds nobody up for good, since the order is one in
which each send may block. On the way back a message holds the gradients of those values that have one. Between ranks values
travel whole or in few bits (:mod:`dspass.runtime.sends`); what stages of one rank hand each other is never rounded.

Dropped: ``torch.distributed.pipelining``'s own runtime under its schedules. It passes inputs to the first stage alone, so that
labels and masks would have to travel; splits backwards by walking autograd's graph, which compiled stages have none of; and
gathers gradients in ``.grad`` of the parameters, where a loss that is scaled afterwards comes too late. Its orders are used
(:mod:`dspass.runtime.schedule`), and its rule for an order of messages in which nobody waits in a circle.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dspass.runtime import stopped
from dspass.runtime.axis import Axis
from dspass.runtime.clock import Moments
from dspass.runtime.schedule import Action, Direction, Kind, Receive, Schedule, Send, Span
from dspass.runtime.sends import Packing
from dspass.runtime.stopped import RankStopped


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """One tensor of a message between two stages, which lies in memory with its dimensions in the order ``dims``, as channels
    last do. ``has_gradient``: the message back holds its gradient. With a ``packing`` both travel in few bits."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool
    dims: tuple[int, ...]
    packing: Packing | None = None

    @classmethod
    def like(cls, name: str, tensor: torch.Tensor, has_gradient: bool, packing: Packing | None = None) -> Value:
        """A value like ``tensor``, which may be fake. It travels as ``packing`` says where it is smaller so."""
        dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        plain = tensor.is_contiguous() or not tensor.permute(dims).is_contiguous()
        whole = cls(
            name=name,
            shape=tuple(int(s) for s in tensor.shape),
            dtype=tensor.dtype,
            has_gradient=has_gradient and tensor.dtype.is_floating_point,
            dims=tuple(range(tensor.dim()) if plain else dims),
        )
        shrinks = packing is not None and packing.shrinks(whole._in_memory, whole.dtype)
        return replace(whole, packing=packing) if shrinks else whole

    def empty(self, device: torch.device | str) -> torch.Tensor:
        """A tensor of its shape, that lies as it does."""
        return self._back(torch.empty(self._in_memory, dtype=self.dtype, device=device))

    def buffer(self, device: torch.device | str) -> torch.Tensor:
        """What it is received in, contiguous."""
        if self.packing is None:
            return torch.empty(self._in_memory, dtype=self.dtype, device=device)
        return torch.empty(self.sent_bytes, dtype=torch.uint8, device=device)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` as it travels: contiguous, and if it travels whole and lies as it should the same memory."""
        return self._in_order(tensor) if self.packing is None else self.packing.pack(self._in_order(tensor))

    def unpack(self, buffer: torch.Tensor) -> torch.Tensor:
        """What has come, lying as it should."""
        if self.packing is not None:
            buffer = self.packing.unpack(buffer, self._in_memory, self.dtype)
        return self._back(buffer)

    def squares(self, tensor: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """As :meth:`Packing.squares`, of a ``tensor`` that travels as ``packed``."""
        assert self.packing is not None
        return self.packing.squares(self._in_order(tensor), packed)

    def laid(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, lying as it does where it has travelled."""
        return self._back(self._in_order(tensor))

    def _in_order(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(self.dims).contiguous()

    def _back(self, travelled: torch.Tensor) -> torch.Tensor:
        return travelled.permute([self.dims.index(d) for d in range(len(self.dims))])

    @property
    def _in_memory(self) -> tuple[int, ...]:
        """Its shape as it lies in memory."""
        return tuple(self.shape[d] for d in self.dims)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def sent_bytes(self) -> int:
        """Of what goes from one rank to another."""
        return self.nbytes if self.packing is None else self.packing.bytes_of(self._in_memory)


class Backward(Protocol):
    """A stage's compiled backward (:mod:`dspass.lowering.stage_backward`)."""

    def adding(self, total_of: Callable[[int], torch.Tensor]) -> Any:
        """A context in which gradients may be added to what ``total_of`` answers for the position of the graph's input, in
        place of being given."""

    def deferred(self, token: int) -> Any:
        """A context in which the backward computes gradients of activations alone, and keeps the rest under ``token``."""

    @property
    def waiting(self) -> Collection[Hashable]:
        """The tokens of what is kept."""

    def weights(self, token: int) -> Sequence[torch.Tensor | None]:
        """The gradients that were left, by the position of the graph's input."""

    def drop(self) -> None:
        """Let go of all that is kept."""


@dataclass(kw_only=True, eq=False)
class Ends:
    """What a stage takes and gives. ``received`` are the values that come from the stage before it and ``sent`` those that go
    to the next. It reads ``reads`` of the former and makes ``makes`` of the latter, by name; the others pass by. ``inputs`` are
    positions of the captured graph's inputs, ``keys`` those of parameters, ``results`` positions of the captured graph's
    outputs.

    A stage's inputs are ``reads``, ``inputs`` and ``keys``, its outputs ``makes`` and ``results``, in these orders."""

    index: int
    received: tuple[Value, ...]
    sent: tuple[Value, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    inputs: tuple[int, ...]
    keys: tuple[str, ...]
    results: tuple[int, ...]


@dataclass(kw_only=True, eq=False)
class Stage(Ends):
    """A stage that lies on this rank, as ``run`` computes it, and its ``backward`` where it trains."""

    run: Callable[..., Sequence[Any]]
    backward: Backward | None = None

    @classmethod
    def of(cls, ends: Ends, run: Callable[..., Sequence[Any]], backward: Backward | None) -> Self:
        return cls(run=run, backward=backward, **{f.name: getattr(ends, f.name) for f in fields(Ends)})


@dataclass(kw_only=True, eq=False)
class _Run:
    """A forward whose backward has not ended. Of what it made there are edges of autograd's graph alone: values that have been
    sent need no memory here unless the backward reads them."""

    leaves: dict[str, torch.Tensor]
    made: dict[str, GradientEdge]
    losses: list[torch.Tensor]


@dataclass(kw_only=True, eq=False)
class Executor:
    """Runs ``schedule`` on the rank ``axis.rank`` of a pipeline. ``loss`` is the position of the captured graph's output
    whose gradient is asked for; None where there are no backwards. ``scale`` is what these begin with, None for 1.
    ``on_last`` is told before each backward whether it is the last of its stage in this call that gives gradients of weights.
    Calls in which it is ``watched`` leave their times, in seconds of ``time.perf_counter``; on a GPU those wait for the
    device, so only few should be."""

    schedule: Schedule
    axis: Axis | None
    stages: Mapping[int, Stage]
    device: torch.device
    loss: int | None
    on_last: Callable[[bool], None] = lambda last: None
    scale: torch.Tensor | None = None
    watched: bool = True
    spans: list[Span] = field(default_factory=list)
    """Of the last call that was watched."""
    wait_seconds: float = 0.0
    """Of the last call that was watched, in which this rank waited for messages."""
    sent_bytes: int = 0
    """Of the last call."""
    rounding: dict[tuple[int, Direction], torch.Tensor] = field(default_factory=dict)
    """Of the first message in few bits that this rank has sent over each cut, numbered by the stage before it, the sums of
    squares (:func:`dspass.runtime.quantise.squares`)."""

    def __call__(
        self, batches: Sequence[Sequence[Any]], shards: Mapping[str, torch.Tensor]
    ) -> dict[int, list[torch.Tensor]]:
        """Run all micro-batches, of each of which ``batches`` has the captured graph's inputs; ``shards`` are those of
        parameters by key. Answers results by output and micro-batch, of those stages that lie here.

        Raises :class:`RankStopped` where another rank stops meanwhile; those hear of whatever else this raises.
        """
        try:
            return _Call(self, batches, shards).run()
        except BaseException as error:
            for stage in self.stages.values():
                if stage.backward is not None:
                    stage.backward.drop()  # of a call that has failed, which nobody will ask for
            if self.axis is not None and isinstance(error, Exception) and not isinstance(error, RankStopped):
                stopped.tell(self.axis, error)
            raise

    @property
    def last_weights(self) -> set[Action]:
        """Of each stage here the last action that gives gradients of weights."""
        last = {}
        for action in self.schedule.actions[self.axis.rank if self.axis is not None else 0]:
            if action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                last[action.stage] = action
        return set(last.values())


class _Call:
    def __init__(
        self, executor: Executor, batches: Sequence[Sequence[Any]], shards: Mapping[str, torch.Tensor]
    ) -> None:
        self.executor, self.batches, self.shards = executor, batches, shards
        self.stages, self.axis = executor.stages, executor.axis
        self.posted: dict[tuple[Direction, int, int], tuple[list[tuple[Value, torch.Tensor]], list[Any], int]] = {}
        self.outbox: dict[tuple[Direction, int, int], list[torch.Tensor]] = {}
        self.going: dict[tuple[Direction, int], deque[list[tuple[Any, torch.Tensor]]]] = defaultdict(deque)
        self.runs: dict[tuple[int, int], _Run] = {}
        self.results: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.last = executor.last_weights
        self.moments = Moments(executor.device.type == "cuda") if executor.watched else None
        self.waits: list[tuple[Any, Any]] = []
        self.sent = 0

    def run(self) -> dict[int, list[torch.Tensor]]:
        spans: list[tuple[Action, Any, Any]] = []
        rank = self.axis.rank if self.axis is not None else 0
        for step in self.executor.schedule.steps(rank):
            if isinstance(step, Send):
                self._send(step)
            elif isinstance(step, Receive):
                self._post(step)
            else:
                message = self._message(step)
                start = self._now()
                self._compute(step, message)
                spans.append((step, start, self._now()))
        for way, messages in self.going.items():
            while messages:
                self._let_go(messages.popleft(), way[1])
        self.executor.sent_bytes = self.sent
        if self.moments is not None:
            self._note(self.moments, spans)
        return dict(self.results)

    def _now(self) -> Any:
        return self.moments.now() if self.moments is not None else None

    def _note(self, moments: Moments, spans: Sequence[tuple[Action, Any, Any]]) -> None:
        moments.settle()
        seconds = moments.seconds
        self.executor.spans = [Span(action, seconds(start), seconds(end)) for action, start, end in spans]
        self.executor.wait_seconds = sum(seconds(end) - seconds(start) for start, end in self.waits)

    # -- messages --------------------------------------------------------------------------------------------------

    def _values(self, direction: Direction, source: int, destination: int) -> list[Value]:
        """What a message holds. Of the two stages that it is between at least one lies here."""
        if direction is Direction.FORWARD:
            ends = self.stages.get(destination), self.stages.get(source)
            found = ends[0].received if ends[0] is not None else ends[1].sent if ends[1] is not None else ()
            return list(found)
        ends = self.stages.get(destination), self.stages.get(source)
        found = ends[0].sent if ends[0] is not None else ends[1].received if ends[1] is not None else ()
        return [v for v in found if v.has_gradient]

    def _post(self, step: Receive) -> None:
        assert self.axis is not None
        values = self._values(step.direction, step.source, step.destination)
        arrivals = [(v, v.buffer(self.executor.device)) for v in values]
        try:
            works = [dist.irecv(b, self.axis.ranks[step.peer], self.axis.group) for _, b in arrivals if b.numel()]
        except RuntimeError as error:
            raise self._stopped(step.peer, "receive a message of") from error
        self.posted[step.direction, step.destination, step.micro_batch] = arrivals, works, step.peer

    def _send(self, step: Send) -> None:
        messages = self.going[step.direction, step.peer]
        messages.append(self._start(step))
        while len(messages) > 1:
            self._let_go(messages.popleft(), step.peer)

    def _start(self, step: Send) -> list[tuple[Any, torch.Tensor]]:
        """Begin a send; answers what must be kept until it has gone."""
        assert self.axis is not None
        values = self._values(step.direction, step.source, step.destination)
        tensors = self.outbox.pop((step.direction, step.destination, step.micro_batch))
        cut, known = min(step.source, step.destination), self.executor.rounding
        going, squares = [], []
        for value, tensor in zip(values, tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (value.dtype, value.shape), f"{value} is sent as {tensor.dtype}"
            if tensor.numel():
                packed = value.pack(tensor)
                try:
                    work = dist.isend(packed, self.axis.ranks[step.peer], self.axis.group)
                except RuntimeError as error:
                    raise self._stopped(step.peer, "send a message to") from error
                going.append((work, packed))
                self.sent += packed.nbytes
                if value.packing is not None and (cut, step.direction) not in known:
                    squares.append(value.squares(tensor, packed))
        if squares:
            known[cut, step.direction] = torch.stack(squares).sum(0)
        return going

    def _let_go(self, message: list[tuple[Any, torch.Tensor]], peer: int) -> None:
        """Of what was sent, once it has gone: a send of gloo's says so only to who waits for it."""
        for work, _ in message:
            if not work.is_completed():
                self._wait(work, peer, "send a message to")

    def _message(self, action: Action) -> list[torch.Tensor]:
        """Wait for what an action reads."""
        direction = Direction.FORWARD if action.kind is Kind.FORWARD else Direction.BACKWARD
        place = direction, action.stage, action.micro_batch
        if action.kind is Kind.WEIGHT:
            return []
        if place in self.posted:
            arrivals, works, peer = self.posted.pop(place)
            start = self._now()
            for work in works:
                self._wait(work, peer, "receive a message of")
            self.waits.append((start, self._now()))
            arrivals.reverse()
            message = []
            while arrivals:  # one after another is let go
                value, buffer = arrivals.pop()
                message.append(value.unpack(buffer))
            return message
        return self.outbox.pop(place, [])  # from a stage on this rank; none for the first, and behind the last

    def _wait(self, work: Any, peer: int, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._stopped(peer, what) from error

    def _stopped(self, peer: int, what: str) -> RankStopped:
        """What to raise where this rank could not do ``what`` the other."""
        assert self.axis is not None
        rank, stages = self.axis.ranks[peer], " and ".join(map(str, self.executor.schedule.stages_of(peer)))
        return stopped.lost(self.axis, f"{what} rank {rank}, stage {stages} of the pipeline", [rank])

    # -- compute ---------------------------------------------------------------------------------------------------

    def _compute(self, action: Action, message: list[torch.Tensor]) -> None:
        stage = self.stages[action.stage]
        if action.kind is Kind.FORWARD:
            self._forward(stage, action.micro_batch, message)
            return
        self.executor.on_last(action in self.last)
        assert stage.backward is not None
        with stage.backward.adding(functools.partial(self._total, stage)):
            if action.kind is Kind.WEIGHT:
                self._weights(stage, stage.backward, action.micro_batch)
            elif action.kind is Kind.INPUT:
                with stage.backward.deferred(action.micro_batch):
                    self._backward(stage, action.micro_batch, message)
            else:
                self._backward(stage, action.micro_batch, message)

    def _total(self, stage: Stage, position: int) -> torch.Tensor:
        """What gradients of the parameter at a position of the stage's inputs are added to."""
        shard = self.shards[stage.keys[position - len(stage.reads) - len(stage.inputs)]]
        if shard.grad is None:
            shard.grad = torch.zeros(shard.shape, dtype=shard.dtype, device=shard.device)
        elif not shard.grad.is_contiguous():  # another stage has the parameter too, and was first
            shard.grad = shard.grad.contiguous()
        return shard.grad

    def _forward(self, stage: Stage, batch: int, message: list[torch.Tensor]) -> None:
        trains = self.executor.loss is not None
        arrived = {v.name: t for v, t in zip(stage.received, message, strict=True)}
        gradients = {v.name for v in stage.received if v.has_gradient} if trains else set()
        leaves = {n: arrived[n].detach().requires_grad_(n in gradients) for n in stage.reads}
        inputs = self.batches[batch]
        with torch.set_grad_enabled(trains):
            answers = stage.run(
                *leaves.values(), *(inputs[i] for i in stage.inputs), *(self.shards[key] for key in stage.keys)
            )
        made = dict(zip(stage.makes, answers[: len(stage.makes)], strict=True))
        results = dict(zip(stage.results, answers[len(stage.makes) :], strict=True))
        if stage.sent:
            sent = [v.laid((made[v.name] if v.name in made else arrived[v.name]).detach()) for v in stage.sent]
            self.outbox[Direction.FORWARD, stage.index + 1, batch] = sent
        for position, result in results.items():
            self.results[position].append(result.detach() if isinstance(result, torch.Tensor) else result)
        if trains:
            losses = [results[self.executor.loss]] if self.executor.loss in results else []
            edges = {n: get_gradient_edge(t) for n, t in made.items() if t.requires_grad}
            self.runs[stage.index, batch] = _Run(leaves=leaves, made=edges, losses=losses)

    def _backward(self, stage: Stage, batch: int, message: list[torch.Tensor]) -> None:
        run = self.runs.pop((stage.index, batch))
        sent = [v for v in stage.sent if v.has_gradient]
        come = {v.name: t for v, t in zip(sent, message, strict=True)}
        roots: list[tuple[torch.Tensor | GradientEdge, torch.Tensor]] = [
            (run.made[n], g) for n, g in come.items() if n in run.made
        ]
        first = 1 if self.executor.scale is None else self.executor.scale
        roots += [(loss, torch.ones_like(loss) * first) for loss in run.losses if loss.requires_grad]
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        if stage.index:
            back = []
            for value in stage.received:
                if value.has_gradient:
                    own = run.leaves[value.name].grad if value.name in run.leaves else None
                    passing = come.get(value.name)
                    back.append(_sum(own, passing, value, self.executor.device))
            self.outbox[Direction.BACKWARD, stage.index - 1, batch] = back

    def _weights(self, stage: Stage, backward: Backward, batch: int) -> None:
        if batch not in backward.waiting:  # nothing here trains
            return
        gradients = backward.weights(batch)
        for key, gradient in zip(stage.keys, gradients[len(stage.reads) + len(stage.inputs) :], strict=True):
            if gradient is not None:
                shard = self.shards[key]
                shard.grad = gradient if shard.grad is None else shard.grad.add_(gradient)


def _sum(own: torch.Tensor | None, passing: torch.Tensor | None, value: Value, device: torch.device) -> torch.Tensor:
    """The gradient of a value that a stage read, handed on, or both."""
    if own is None:
        return passing if passing is not None else value.empty(device).zero_()
    return own if passing is None else own + passing


__all__ = ["Backward", "Ends", "Executor", "Stage", "Value"]
