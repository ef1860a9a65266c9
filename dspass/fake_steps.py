"""What a prediction runs (:mod:`dspass.prediction`): a plain training loop, whose model and batch are fake tensors and whose
process group sends nothing. A ledger is told what that loop would hold.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dspass.optimizers import Optimizers
from dspass.runtime import compat
from dspass.runtime.axis import MODELLED
from dspass.runtime.engine import Engine
from dspass.runtime.ledger import HOST, Ledger
from dspass.runtime.stepping import Optimizer
from dspass.settings import step_moments


@contextlib.contextmanager
def fake_group(world: int, backend: str, always: bool) -> Iterator[None]:
    """A process group of ``world`` ranks in which nothing is sent; modelled as ``backend``. One rank has none, unless
    ``always``."""
    if dist.is_initialized():
        raise RuntimeError(
            "dspass.explain predicts in a fake process group, and this process is in a real one: predict before "
            "init_process_group(), or in a process of its own (python -m dspass explain --help)."
        )
    if world == 1 and not always:
        yield
        return
    compat.init_fake_group(world)
    modelled = MODELLED.set(backend)
    try:
        yield
    finally:
        MODELLED.reset(modelled)
        dist.destroy_process_group()


def faked(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with fake parameters and buffers; meta ones become fake ones on the CPU. Ties are kept.
    Called under a fake mode, as :func:`fake_inputs` is."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in memo:
            continue
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memo[id(tensor)] = (
            nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        )
    return copy.deepcopy(model, memo)


def fake_inputs(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), values
    )


class Steps:
    """Training steps on fake tensors, the optimiser's by what it holds (:func:`dspass.settings.step_moments`).

    What the model answers is held to the end of the step, as a variable of the training loop holds it (``out = model(x)``) and
    as a plan supposes (:mod:`dspass.planner.dry_run`): a budget must hold for that loop, too. One that says ``model(x).loss``
    lets go of the logits before its backward, and takes as many bytes less, unless the backward reads them.
    """

    def __init__(
        self,
        compiled: Any,
        model: nn.Module,
        engine: Engine,
        batch: Sequence[Any],
        named: dict[str, Any],
        optimizer: Optimizer,
        train: bool,
        ledger: Ledger,
    ) -> None:
        self.compiled, self.model, self.engine = compiled, model, engine
        self.batch, self.named, self.optimizer, self.train, self.ledger = batch, named, optimizer, train, ledger
        self.kept: dict[int, torch.Tensor] = {}
        """The optimiser's states, by the parameter that they are of."""
        self.waited: set[int] = set()
        """Whose states were on the host."""

    def run(self) -> None:
        self.ledger.phase = "forward"
        hosted = {id(spec.param()) for spec in self.engine.specs.values() if spec.on_host}
        for param in self.model.parameters():
            self.ledger.note(param.data, HOST if id(param) in hosted else "parameters")
        self.ledger.note(list(self.model.buffers()), "parameters")
        self.ledger.note([self.batch, self.named])  # the loop holds them, whether the backward reads them or not
        for _ in range(self.engine.accumulation_steps if self.train else 1):
            if not self.train:
                with torch.no_grad():
                    self.compiled(*self.batch, **self.named)
                continue
            answer = self.compiled(*self.batch, **self.named)
            loss = _loss(answer)
            self.ledger.phase = "backward"
            # The first backward of a model that is being sharded is autograd's own.
            with contextlib.nullcontext() if self.engine.compilations else self.ledger.watching():
                loss.backward()
            self.ledger.phase = "forward"
            if not self.engine.compilations:
                break  # autograd's own backward of fake tensors tells the engine nothing: no call of a step to count
        if self.train:
            self._optimizer_step()

    def _optimizer_step(self) -> None:
        self.engine.before_step()
        self.ledger.phase, self.ledger.label = "optimizer", "optimizer.step"
        trained = [p for p in self.model.parameters() if p.grad is not None]
        away = self.engine.host_states
        hosted = {id(spec.param()) for spec in self.engine.specs.values() if spec.on_host}
        for param in trained:
            self.ledger.note(param.grad, HOST if id(param) in hosted else "gradients")
            # Where they wait was decided behind the step that made them, if a plan did; what comes from there is other memory.
            waits = param in away or id(param) in hosted
            if id(param) not in self.kept or (id(param) in self.waited and not waits):
                self.kept[id(param)] = torch.empty(self.optimizer.state_bytes(param), dtype=torch.uint8)
            (self.waited.add if waits else self.waited.discard)(id(param))
            self.ledger.note(self.kept[id(param)], HOST if waits else "optimizer")
        for moment in step_moments(self.engine, Optimizers(self.engine), trained):
            came, made = (torch.empty(count, dtype=torch.uint8) for count in (moment.states, moment.temporaries))
            self.ledger.note(came, "optimizer")
            self.ledger.note(made)
            del came, made
        self.engine.after_step()
        for param in trained:
            param.grad = None
        self.ledger.phase = "forward"


def _loss(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        loss = result
    elif getattr(result, "loss", None) is not None:
        loss = result.loss
    else:
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not leaves:
            raise ValueError(
                "the model's output holds no tensor with a gradient: pass labels so that it answers a loss, or "
                "use train=False."
            )
        loss = leaves[0]
    return loss if loss.dim() == 0 else loss.float().sum()
