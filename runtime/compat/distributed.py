"""Process groups, and the orders of ``torch.distributed.pipelining``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def init_fake_group(size: int) -> None:
    """The default process group, of ``size`` ranks of which only this one exists; nothing is ever sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


def store() -> Any:
    """The key-value store of the default process group: safe inside of a compilation, where a collective is not."""
    return torch.distributed.distributed_c10d._get_default_store()


def pipeline_order(name: str, ranks: int, virtual_stages: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """What each rank of a pipeline computes, in order, by the schedule class ``name`` of ``torch.distributed.pipelining``.

    Each is the letter of torch's kind of action ("F", "B", "I" or "W"), the stage and the micro-batch; pairs that torch means
    to overlap come one after the other, and bubbles are left out. ``virtual_stages`` is how many stages a rank has. The classes
    read nothing of a stage but its numbers, so neither processes nor modules are needed. ``ValueError`` as torch raises it.
    """
    from torch.distributed.pipelining import schedules

    # Sends and receives are added later, to what is kept: torch would add its own to an order that is only read.
    cls = schedules.get_schedule_class(name)
    cls = type(cls.__name__, (cls,), {"_prepare_schedule_with_comms": lambda *_, **__: None})
    stages = [_NumberedStage(ranks, ranks * virtual_stages) for _ in range(virtual_stages)]
    single = issubclass(cls, schedules.PipelineScheduleSingle)
    order = cls(stages[0] if single else stages, micro_batches).pipeline_order
    answer: list[list[tuple[str, int, int]]] = []
    for rank in range(ranks):
        flat = [part for action in order[rank] if action is not None for part in action.sub_actions or (action,)]
        answer.append(
            [
                (action.computation_type.value, action.stage_index, action.microbatch_index)
                for action in flat
                if action.computation_type.value in ("F", "B", "I", "W")
            ]
        )
    if single:  # torch 2.13 counts the forwards of 1F1B's last rank from 1
        for actions in answer:
            forward = itertools.count()
            actions[:] = [(k, stage, next(forward) if k == "F" else batch) for k, stage, batch in actions]
    return answer


class _NumberedStage:
    """As much of a stage as a schedule reads to make its order."""

    is_last = False
    submod = None
    group_rank = 0

    def __init__(self, group_size: int, num_stages: int) -> None:
        self.group_size = group_size
        self.num_stages = num_stages
        self.stage_index_to_group_rank: dict[int, int] = {}


def with_transfers(
    order: Sequence[Sequence[tuple[str, int, int]]], rank_of: Sequence[int]
) -> list[list[tuple[str, int, int]]]:
    """``order`` as :func:`pipeline_order` answers it, with "SEND_F", "RECV_F", "SEND_B" and "RECV_B" between, each by the
    stage that does it; ``rank_of`` has the rank of each stage. Both ends of a transfer stand at one moment of an order of all
    ranks, so none waits in a circle, even where both ends block. ``ValueError`` for an order that cannot be run at all."""
    from torch.distributed.pipelining import schedules

    def action(kind: str, stage: int, batch: int) -> Any:
        return schedules._Action(stage, schedules._ComputationType(kind), batch)

    actions = {rank: [action(*one) for one in ones] for rank, ones in enumerate(order) if ones}
    try:
        done = schedules._add_send_recv(actions, rank_of.__getitem__, len(rank_of))
    except AssertionError as error:
        raise ValueError(str(error)) from None
    return [
        [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in done.get(rank, ())]
        for rank in range(len(order))
    ]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: not a copy, and no node of autograd's, as ``to_local`` makes one."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def set_local(tensor: DTensor, local: torch.Tensor) -> None:
    """Have ``local`` as what this rank holds of a tensor."""
    tensor._local_tensor = local
