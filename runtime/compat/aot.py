"""AOTAutograd: the backend that it is, how it traces, what its outputs are, and how it cuts a joint graph in two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.fx as fx


def aot_backend(**options: Any) -> Callable[..., Any]:
    """AOTAutograd as a Dynamo backend (``torch._dynamo.backends.common.aot_autograd``)."""
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(**options)


@contextlib.contextmanager
def own_tracing() -> Iterator[None]:
    """Have AOTAutograd trace as it does inside of Dynamo: sizes of inputs are numbers, those that data decides are symbols."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class OfNumbers(FakeTensorMode):
        """ShapeEnv's ``assume_static_by_default`` serves Dynamo, which says so of each tensor: here all would be symbols."""

        def from_tensor(self, tensor: torch.Tensor, *, static_shapes: bool | None = None, **options: Any) -> FakeTensor:
            return super().from_tensor(tensor, static_shapes=True, **options)

    mode = OfNumbers(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield


@dataclass(frozen=True)
class Gradient:
    """What an output of a backward graph is: the gradient ``of`` an input of the compiled graph, by its place there;
    ``is_part`` of it where the input is a tensor subclass, such as a DTensor, and this belongs inside of its gradient."""

    of: int
    is_part: bool


def gradient(desc: Any) -> Gradient | None:
    """Read AOTAutograd's description of an output of a backward graph; None where it describes another thing than a gradient
    of an input."""
    from torch._functorch._aot_autograd import descriptors

    is_part = False
    while isinstance(desc, descriptors.SubclassGetAttrAOTOutput):
        desc, is_part = desc.base, True
    if not isinstance(desc, descriptors.GradAOTOutput):
        return None
    source: Any = desc.grad_of
    while isinstance(source, (descriptors.ViewBaseAOTInput, descriptors.SyntheticBaseAOTInput)):
        source = source.base_of  # several inputs of one memory
    return Gradient(source.idx, is_part) if isinstance(source, descriptors.PlainAOTInput) else None


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators compute in the precision of their inputs, whatever ``torch.autocast`` says outside."""
    return torch._C._DisableAutocast()


#: What Inductor's own min-cut saves.
Unplanned = Callable[[], list[fx.Node]]

#: Answers the nodes to save in place of Inductor's min-cut. It is given the joint graph as it will be split, the nodes in order
#: that do not depend on the gradients that come in, those placeholders that cost nothing, and what Inductor would save.
Chooser = Callable[[fx.Graph, Sequence[fx.Node], frozenset[fx.Node], Unplanned], list[fx.Node]]


def min_cut_partition(
    joint: fx.GraphModule,
    inputs: Any,
    num_fwd_outputs: int,
    free_inputs: Sequence[int],
    recompute_pointwise: bool = False,
    choose: Chooser | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph by min-cut, or as ``choose`` says; ``free_inputs`` are the indices of placeholders that cost nothing
    to save.

    ``recompute_pointwise`` also recomputes a value that the backward graph has to write to memory again, such as the
    activation function in front of a matrix product.
    """
    from torch._functorch import config, partitioners
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    theirs = partitioners.choose_saved_values_set

    def chosen(graph: fx.Graph, info: Any, *args: Any, **kwargs: Any) -> list[fx.Node]:
        assert choose is not None
        backward = getattr(info, "tangents_closure", info.required_bw_nodes)  # one set until torch 2.12
        forward = [node for node in graph.nodes if node.op != "output" and node not in backward]
        free = frozenset(info.static_lifetime_input_nodes)
        return choose(graph, forward, free, lambda: theirs(graph, info, *args, **kwargs))

    ours = mock.patch.object(partitioners, "choose_saved_values_set", chosen) if choose else contextlib.nullcontext()
    settings = {
        "treat_parameters_as_free_to_save": True,
        "ban_recompute_materialized_backward": not recompute_pointwise,
    }
    with config.patch(settings), ours, _use_lazy_graph_module(True):
        return min_cut_rematerialization_partition(
            joint,
            inputs,
            compiler="inductor",
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=list(free_inputs),
        )
