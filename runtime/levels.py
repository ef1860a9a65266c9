"""All-to-alls over two levels: inside of a node first, and then across nodes.

Rank ``l`` of node ``m`` sends what goes to rank ``k`` of any node to rank ``k`` of its own node, which has the rows of all of
its node for its peers in others, and sends each of these one message. A rank then sends ``ranks of a node - 1`` messages
inside and ``nodes - 1`` across, in place of one to each other rank (Rajbhandari et al., DeepSpeed-MoE, 2022; Hwang et al.,
Tutel, 2023). Rows arrive in the order of the ranks that they come from, as they do from a flat exchange, to the last bit.

How many rows each rank has for each other one is known on all ranks before they are sent, so that the sizes of the hop in
the middle cost no exchange of their own.

The first hop is waited for where the exchange starts, and compute overlaps with the second alone, whose link is slower by
far. Dropped: to start the second at the wait, where nothing is left to hide it. Dropped: across nodes first. As much is sent
inside then, and each rank's adapter carries its own rows, however uneven, where now a node's ranks share what leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspass.runtime.axis import Axis
from dspass.runtime.transport import InFlight, transport_for

#: Rows that each rank (first) has for each other one.
Table = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """An axis of ranks, as those of each ``node``, consecutive ones, and those of one place in all nodes, ``across``. Exchanges
    of which a rank has up to ``most_bytes``, on average, go over both."""

    node: Axis
    across: Axis
    most_bytes: float

    def pay(self, table: Table, row_bytes: int) -> bool:
        """Whether so many rows go over both; all ranks answer alike, for they know the same ``table``."""
        return sum(map(sum, table)) * row_bytes <= self.most_bytes * len(table)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One exchange of one rank: its rows are divided into ``parts`` and sent in the ``order`` of these; ``sent`` are those to
    each rank of the hop's axis, ``received`` those from each."""

    parts: list[int]
    order: list[int]
    sent: list[int]
    received: list[int]


def hops(table: Table, rank: int, local: int) -> tuple[Hop, Hop]:
    """The two of ``rank``, in nodes of ``local`` ranks."""
    nodes = len(table) // local
    mine, place = divmod(rank, local)
    by_place = [n * local + k for k in range(local) for n in range(nodes)]
    middle = [[table[mine * local + k][n * local + place] for n in range(nodes)] for k in range(local)]
    inside = Hop(
        parts=list(table[rank]),
        order=by_place,
        sent=[sum(table[rank][n * local + k] for n in range(nodes)) for k in range(local)],
        received=[sum(row) for row in middle],
    )
    across = Hop(
        parts=[count for row in middle for count in row],
        order=[k * nodes + n for n in range(nodes) for k in range(local)],
        sent=[sum(row[n] for row in middle) for n in range(nodes)],
        received=[sum(table[n * local + k][rank] for k in range(local)) for n in range(nodes)],
    )
    return inside, across


def exchange_by_levels(
    levels: Levels, rank: int, tensors: Sequence[torch.Tensor], table: Table, dry: bool = False
) -> tuple[float, InFlight]:
    """Send the rows of ``tensors``, in the order of the ranks that they go to, as ``table`` says, on rank ``rank`` of it.
    Answers the seconds of waiting inside of the node, and what is under way across nodes."""
    inside, across = hops(table, rank, levels.node.size)
    first = transport_for(levels.node, dry).exchange(
        levels.node, [_reordered(t, inside) for t in tensors], inside.sent, inside.received
    )
    arrived = first.wait()
    second = transport_for(levels.across, dry).exchange(
        levels.across, [_reordered(t, across) for t in arrived], across.sent, across.received
    )
    return first.exposed_seconds, second


def _reordered(rows: torch.Tensor, hop: Hop) -> torch.Tensor:
    parts = rows[: sum(hop.parts)].split(hop.parts)
    return torch.cat([parts[i] for i in hop.order])
