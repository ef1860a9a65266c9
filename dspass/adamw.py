"""AdamW over all parameters in one pass over their memory, with states of fp32 or of 8 bits, and stochastic rounding in bf16.

The arithmetic and the formats are :mod:`dspass.runtime.adamw`'s; here is what makes an optimiser of it. It steps what this rank
holds of each parameter, so it is at home in every stage, with states on the host, with stages and experts.

**States of 8 bits are fp32 wherever they leave the optimiser.** ``state_dict()`` answers ``exp_avg`` and ``exp_avg_sq`` in
fp32, shaped and divided as the parameter is, so a checkpoint loads on any number of ranks, with any ``state_bits``, and into
``torch.optim.AdamW`` and out of it; while it is written, fp32 states of this rank's shards exist. What is loaded is put into
8 bits at the next step, when it has been divided: the same codes as were saved, with scales to the last two bits.

**Random bits** are told apart by a number that each parameter gets once, so a rank that lacks others' gradients, as one of a
pipeline does, and a step that goes part by part draw the same ones; shards of one parameter draw by their place in it, and
copies of one alike.

Dropped: codes as a tensor subclass, which checkpoints and DTensor would take for a parameter's shape; every operator of theirs
would have to be taught to it. Dropped: codes in checkpoints, as bitsandbytes has them: blocks of 256 values cannot be divided
over another number of ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from dspass.runtime.adamw import DTYPES, packed, states_of_8_bits, unpacked
from dspass.runtime.host_states import local_of
from dspass.runtime.stepping import Optimizer, bytes_of_adamw, own_adamw

_FP32 = ("exp_avg", "exp_avg_sq")
_8_BITS = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")

_alive: weakref.WeakSet[AdamW] = weakref.WeakSet()


class AdamW(torch.optim.Optimizer):
    """As ``torch.optim.AdamW``, in one call of ``dspass::adamw_`` or ``dspass::adamw_8bit_`` for all parameters of a group.

    Args:
        state_bits: 32 keeps both states in fp32, also those of bf16 parameters; 8 keeps them in one byte a value and one fp32
            scale for each 256 (Dettmers et al., 8-bit optimizers via block-wise quantization, 2022).
        stochastic_rounding: bf16 parameters are rounded up with the probability of what would be cut off, so that updates
            below half of their last bit are not lost. Without it they are rounded to nearest.
        seed: of all random bits, up to 64 bits; the same on all ranks.

    All of these may differ by parameter group. Parameters and gradients are fp32 or bf16. Raises ``ValueError`` for settings
    that cannot be, and in ``step`` for parameters and gradients that cannot be.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)
        self._set_up()

    def _set_up(self) -> None:
        _alive.add(self)
        self._numbers = WeakIdKeyDictionary()  # of parameters
        self._counted = 0
        # A step may go part by part, with a part of each group's parameters at a time; its hooks see all of them.
        self.register_step_pre_hook(_number)
        self.register_state_dict_post_hook(_in_fp32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            _check_group(group)
        if self not in _alive:  # a copy, or unpickled
            self._set_up()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast states in fp32 to a parameter's bf16.

        ``state_bits`` stay what they are here: they are how states are kept, not what is trained.
        """
        bits = [group["state_bits"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mine in zip(self.param_groups, bits, strict=True):
            group["state_bits"] = mine
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            given, mine = state_dict["state"].get(number, {}), self.state.get(param, {})
            for key in _FP32:
                if key in given and key in mine and given[key].dtype is not mine[key].dtype:
                    mine[key] = given[key].to(device=mine[key].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; answers what ``closure`` does."""
        _number(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            _check(param)  # before any is stepped
        for group in self.param_groups:
            calls: dict[tuple[int, int, torch.device], list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state_of(param, group)
                    state["step"] += 1
                    calls.setdefault((int(state["step"]), _shard_of(param), local_of(param).device), []).append(param)
            for (step, shard, _), params in calls.items():
                self._step(params, group, step, group["seed"] + (shard << 32))
        return loss

    def _step(self, params: list[torch.Tensor], group: dict[str, Any], step: int, seed: int) -> None:
        """Random bits go by the place in a list, so each parameter stands at its number, among others that are empty."""
        is_8_bits = group["state_bits"] == 8
        keys = _8_BITS if is_8_bits else _FP32
        count = 1 + max(self._numbers[param] for param in params)
        device = local_of(params[0]).device
        nothing = torch.empty(0, device=device)
        none = (nothing, nothing, *(states_of_8_bits(nothing) if is_8_bits else (nothing, nothing)))
        rows: list[tuple[torch.Tensor, ...]] = [none] * count
        copies = []
        for param in params:
            assert param.grad is not None
            mine, grad = local_of(param), local_of(param.grad)
            held = mine.detach().contiguous()
            if held.data_ptr() != mine.data_ptr():
                copies.append((mine, held))
            states = [local_of(self.state[param][key]) for key in keys]
            rows[self._numbers[param]] = (held, grad, *states)
        beta1, beta2 = group["betas"]
        op = torch.ops.dspass.adamw_8bit_ if is_8_bits else torch.ops.dspass.adamw_
        op(
            *map(list, zip(*rows, strict=True)),
            step,
            torch.as_tensor(group["lr"], dtype=torch.float64, device="cpu"),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            (seed + 2**63) % 2**64 - 2**63 if group["stochastic_rounding"] else None,
        )
        for mine, held in copies:
            mine.copy_(held)

    def _state_of(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The states of ``param`` as its group has them: new ones, or what was loaded."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        if group["state_bits"] == 32:
            if _8_BITS[0] in state:
                state.update(_fp32_states(param, [state.pop(key) for key in _8_BITS]))
            for key in _FP32:
                if key not in state:
                    state[key] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.contiguous_format)
                elif state[key].dtype is not torch.float32:
                    state[key] = state[key].float()
            return state
        mine = local_of(param)
        if _FP32[0] in state:
            first, second = (local_of(state.pop(key)).to(mine.device, torch.float32) for key in _FP32)
            state.update(zip(_8_BITS, packed(first, second), strict=True))
        elif _8_BITS[0] not in state:
            state.update(zip(_8_BITS, states_of_8_bits(mine), strict=True))
        return state

    def as_planned(self) -> Optimizer:
        """What a plan counts of it, now that it is there."""
        bits = {id(param): group["state_bits"] for group in self.param_groups for param in group["params"]}
        return own_adamw(min(bits.values()), lambda param: bytes_of_adamw(param, bits.get(id(param), 32)))


def _number(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, AdamW)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in optimizer._numbers:
                optimizer._numbers[param] = optimizer._counted
                optimizer._counted += 1


def _shard_of(param: torch.Tensor) -> int:
    """The place in ``param`` of what this rank holds of it."""
    place = 0
    if isinstance(param, DTensor):
        coordinate = param.device_mesh.get_coordinate()
        assert coordinate is not None
        for dim, placement in enumerate(param.placements):
            if placement.is_shard():
                place = place * param.device_mesh.size(dim) + coordinate[dim]
    return place


def _fp32_states(param: torch.Tensor, codes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """As tensors that are divided as ``param`` is."""
    values = unpacked([local_of(code) for code in codes], local_of(param))
    if isinstance(param, DTensor):
        values = tuple(
            DTensor.from_local(
                value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
            )
            for value in values
        )
    return dict(zip(_FP32, values, strict=True))


@torch.no_grad()
def _in_fp32(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """States of 8 bits as others know them."""
    states = dict(state_dict["state"])
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in enumerate(params):
        state = states.get(number, {})
        if _8_BITS[0] in state:
            others = {key: value for key, value in state.items() if key not in _8_BITS}
            states[number] = others | _fp32_states(param, [state[key] for key in _8_BITS])
    return {**state_dict, "state": states}


# -- what cannot be ------------------------------------------------------------------------------------------------------


def _check_group(group: dict[str, Any]) -> None:
    for name, least in (("lr", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        if not float(group[name]) >= least:
            raise ValueError(f"{name}={group[name]!r} cannot be: take one of at least {least:g}.")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} cannot be: take two, each at least 0 and below 1.")
    if group["state_bits"] not in (8, 32):
        raise ValueError(f"state_bits={group['state_bits']!r} cannot be: take 32 or 8.")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name}=True is not known to dspass.AdamW: use torch.optim.AdamW.")


def _check(param: torch.Tensor) -> None:
    grad = param.grad
    assert grad is not None
    what = f"a parameter of shape {list(param.shape)}"
    if grad.layout is not torch.strided:
        raise ValueError(f"{what} has a gradient in layout {grad.layout}: take torch.optim.SparseAdam for it.")
    for name, dtype in ((what, param.dtype), (f"the gradient of {what}", grad.dtype)):
        if dtype not in DTYPES:
            kinds = " and ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(
                f"{name} is {str(dtype).removeprefix('torch.')}: dspass.AdamW steps {kinds}; use torch.optim.AdamW."
            )
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and param.placements != grad.placements:
        raise ValueError(f"{what} is divided as {param.placements} and its gradient as {grad.placements}.")


__all__ = ["AdamW"]
