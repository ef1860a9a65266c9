"""The project's own operators: one schema, one fake and one readable reference each, and who serves them where.

An operator is declared once, on its reference::

    @operator("scale(Tensor x, float factor) -> Tensor", fake=lambda x, factor: torch.empty_like(x))
    def scale(x, factor):
        return x * factor

and is ``torch.ops.dspass.scale`` from then on. The reference is plain torch, right on every device, and what serves a device
that no kernel was written for: :mod:`dspass.lowering.expand` puts it into the graph in the operator's place, so that Inductor
fuses it with what stands around it. A kernel, where one is built (``cuda_src/``), registers itself for its own device and
goes first there; ``DSPASS_KERNELS=reference`` leaves kernels out.

Dropped: ``torch.library.custom_op``, whose every call takes three times as long as that of an operator defined here, and whose
results Inductor cannot fuse. Dropped: decompositions of AOTAutograd, which come too early: passes would see dozens of nodes
where a reader, and a kernel, sees one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dspass.runtime import compat

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("dspass", "FRAGMENT")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """``reference`` takes and answers what the schema says."""

    name: str
    schema: str
    reference: Callable[..., Any]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What stands in a graph."""
        return getattr(torch.ops.dspass, self.name).default

    def server(self, device: str) -> str:
        """Who answers a call with tensors on ``device``: "kernel" or "torch reference"."""
        return "kernel" if compat.has_kernel(f"dspass::{self.name}", device.upper()) else "torch reference"


#: All of them, by name.
OPERATORS: dict[str, Operator] = {}


def operator(schema: str, *, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Declare ``dspass::<schema>`` with the decorated function as its reference; ``fake`` answers shapes and dtypes."""
    name = schema.partition("(")[0]

    def declare(reference: _Function) -> _Function:
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dspass::{name}", fake, lib=_library)
        if "!" in schema:
            _tell_autograd_what_changes(name)
        OPERATORS[name] = Operator(name=name, schema=schema, reference=reference)
        return reference

    return declare


def _tell_autograd_what_changes(name: str) -> None:
    """Count versions of what ``name`` writes to, as ``torch.library.custom_op`` does: a kernel changes memory behind torch's
    back, and a gradient that needs what was there before has to be refused, not wrong."""
    overload = getattr(torch.ops.dspass, name).default
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def count(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i] if i < len(args) else kwargs[arguments[i].name])
        return overload.redispatch(compat.behind_versions(keyset), *args, **kwargs)

    _library.impl(name, count, "ADInplaceOrView", with_keyset=True)


def implement(name: str, device: str) -> Callable[[_Function], _Function]:
    """Have the decorated function answer operator ``name`` on ``device``, a dispatch key such as "CPU", in the reference's
    place: there a graph calls it as it is, and nothing of it is fused."""

    def register(function: _Function) -> _Function:
        _library.impl(name, function, device)
        return function

    return register


def differentiable(name: str, *, backward: Callable[..., Any], keep: Callable[..., Any]) -> None:
    """Give operator ``name`` a gradient: ``keep(ctx, inputs, output)`` at its call, and ``backward(ctx, *grads)``, which
    answers one for each input; ``torch.library.register_autograd`` calls the first ``setup_context``."""
    torch.library.register_autograd(f"dspass::{name}", backward, setup_context=keep, lib=_library)


def operator_of(target: Any) -> Operator | None:
    """The operator that stands in a graph as ``target``; None where that is none of these."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "dspass":
        return None
    return OPERATORS.get(target.overloadpacket.__name__)
