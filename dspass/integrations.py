"""The Hugging Face ``Trainer`` and Accelerate beside a sharded model.

Left alone, both wrap a model in DistributedDataParallel under ``torchrun``, which refuses DTensors and would reduce each
gradient twice, and both save what rank 0 holds. :class:`ShardedAccelerator` and :class:`ShardedTrainer` are mixins over
their public classes that keep all the rest: each rank still has its own batches. ``Accelerator`` and ``Trainer`` of this
module are the two put together with the libraries' own classes; nothing is imported before they are asked for::

    from dspass.integrations import Trainer
    trainer = Trainer(model=model, args=args, train_dataset=data, config={"zero_optimization": {"stage": 3}})

docs/recipes.md has a whole script for each. Tried with accelerate 1.15 and transformers 5.23. What is not public there:
``Accelerator._optimizers`` (set aside while states are saved: ours are saved by all ranks) and the ``Trainer`` methods
``_save``, ``_save_optimizer_and_scheduler`` and ``_load_optimizer_and_scheduler``.

Dropped: a ``TrainerCallback``. It can keep the wrapper away, by marking the model as prepared, but the ``Trainer`` then has
rank 0 alone write a state dict that only all ranks together hold. Also dropped: ``torch_compile_backend="deepspeed"`` in
``TrainingArguments``, since Accelerate's list of backends is closed and its plugin carries no options from there.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from dspass.config import Config
from dspass.engines import engine_of, no_sync
from dspass.owners import unwrap
from dspass.shard import shard

if TYPE_CHECKING:
    from accelerate import Accelerator as _Accelerator
    from transformers import Trainer as _Trainer
else:
    _Accelerator = _Trainer = object

Options = None | str | os.PathLike[str] | Mapping[str, Any]

#: Inside of a checkpoint's folder: what all ranks write together, by ``torch.distributed.checkpoint``.
MODEL_FOLDER, OPTIMIZER_FOLDER = "dspass_model", "dspass_optimizer"


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole model under its own names, on rank 0's CPU; empty on other ranks. Every rank has to call it.

    It is gathered parameter by parameter, and is what ``from_pretrained``, ``load_state_dict`` and one process read.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(unwrap(model), options=options)
    return state if not dist.is_initialized() or dist.get_rank() == 0 else {}


def save_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``model`` as every rank holds it. Read by :func:`load_model`, on any number of ranks."""
    _save({"model": get_model_state_dict(unwrap(model))}, folder)


def load_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill ``model``, sharded or not, in place."""
    model = unwrap(model)
    state = {"model": get_model_state_dict(model)}
    _load(state, folder)
    set_model_state_dict(model, state["model"])


def save_optimizers(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], folder: str | os.PathLike[str]
) -> None:
    """Write the states of ``optimizers`` by the names of ``model``'s parameters, each rank its part."""
    state = get_optimizer_state_dict(unwrap(model), [_bare(o) for o in optimizers])
    _save({"optimizer": state}, folder)


def load_optimizers(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], folder: str | os.PathLike[str]
) -> None:
    """Read what :func:`save_optimizers` wrote, on any number of ranks. Optimisers may be fresh."""
    model, bare = unwrap(model), [_bare(o) for o in optimizers]
    state = {"optimizer": get_optimizer_state_dict(model, bare)}
    _load(state, folder)
    set_optimizer_state_dict(model, bare, state["optimizer"])


def _save(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    with warnings.catch_warnings():
        # Both libraries overwrite their own files without a word, and a single process is no mistake.
        warnings.filterwarnings("ignore", "Detected an existing checkpoint", UserWarning)
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(state, checkpoint_id=folder)


def _load(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, checkpoint_id=folder)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser under Accelerate's, whose ``step`` does nothing between gradient synchronisations."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _is_compiled(model: nn.Module) -> bool:
    return unwrap(model) is not model or model._compiled_call_impl is not None


class ShardedAccelerator(_Accelerator):
    """Over ``accelerate.Accelerator``: no DistributedDataParallel, and checkpoints of the whole model.

    ``config`` is as ``options`` of ``torch.compile(backend="deepspeed")``. A model that is compiled with that backend
    already is left as it is; ``prepare`` shards and compiles any other one in place. Under ``accumulate`` and ``no_sync``,
    reductions wait as far as the ZeRO stage allows (:func:`dspass.no_sync`). ``save_state`` and ``load_state`` use
    ``torch.distributed.checkpoint``: every rank writes its part, and any number of ranks may read it.
    """

    _optimizers: list[Any]  # Accelerate's own

    def __init__(self, *args: Any, config: Options = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plug(config)

    def _plug(self, config: Options) -> None:
        if self.distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            raise ValueError(
                f"Accelerate is set up for {self.distributed_type.value}, which shards the model itself: drop its plugin, or "
                "its part of the file that `accelerate config` wrote, and give the configuration as config=... here."
            )
        if self.num_processes > 1 and not self.even_batches:
            raise ValueError(
                "even_batches=False gives ranks different numbers of batches, and the rank with one more would wait for ever "
                "for the others' parts of its parameters. Leave even_batches at True."
            )
        self._dspass_config = config
        self._dspass_seen: set[int] = set()
        self.register_save_state_pre_hook(self._save_sharded)
        self.register_load_state_pre_hook(self._load_sharded)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Shard and compile ``model`` in place, unless that was done before."""
        # Evaluation mode is Accelerate's way to prepare without DistributedDataParallel; there is nothing else to it.
        model = super().prepare_model(model, device_placement=device_placement, evaluation_mode=True)
        if _is_compiled(model):
            if self._dspass_config is not None and id(model) not in self._dspass_seen:
                raise ValueError(
                    "the model is compiled already and a config was given beside it: give the config to one of them, either "
                    'model.compile(backend="deepspeed", options=config) or config=config here.'
                )
            return model
        engine = engine_of(model)
        config = engine.config if engine is not None and self._dspass_config is None else self._dspass_config
        if engine is None:
            shard(model, config)
        options = config.to_dict() if isinstance(config, Config) else config
        model.compile(backend="deepspeed", options=options)
        self._dspass_seen.add(id(model))
        return model

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """As Accelerate's; raises ``RuntimeError`` where nothing would average a model's gradients over ranks."""
        super().backward(loss, **kwargs)
        for model in self._models if self.num_processes > 1 else []:
            if engine_of(model) is None and any(p.grad is not None for p in model.parameters()):
                raise RuntimeError(
                    f"{type(unwrap(model)).__name__} is compiled with another backend than 'deepspeed', so nothing averages "
                    'its gradients over ranks: compile it with model.compile(backend="deepspeed"), or leave that to prepare().'
                )

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Let reductions of ``model``'s gradients wait for the first backward outside."""
        with no_sync(model):
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """As Accelerate's, with the norm of the whole model as a plain tensor, on every rank."""
        norm: Any = super().clip_grad_norm_(parameters, max_norm, cast(Any, norm_type))  # typed as an integer there
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole model on rank 0's CPU, empty on other ranks; every rank has to call it. See :func:`full_state_dict`.

        ``unwrap=False`` (what ``save_state`` asks for) gives this rank's part of it.
        """
        return full_state_dict(model) if unwrap else model.state_dict()

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerate's, except that every rank writes its part of models and optimisers."""
        with self._optimizers_aside():
            return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        """As Accelerate's, of what :meth:`save_state` wrote on any number of ranks."""
        with self._optimizers_aside():
            super().load_state(*args, **kwargs)

    @contextlib.contextmanager
    def _optimizers_aside(self) -> Iterator[None]:
        # Accelerate has rank 0 alone write an optimiser; its hooks can take models out of its hands, optimisers not.
        self._dspass_optimizers, self._optimizers = self._optimizers, []
        try:
            yield
        finally:
            self._optimizers = self._dspass_optimizers

    def _save_sharded(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for i, model in enumerate(models):
            save_model(model, Path(folder) / f"{MODEL_FOLDER}_{i}")
            optimizers = self._optimizers_of(model)
            if optimizers:
                save_optimizers(model, optimizers, Path(folder) / f"{OPTIMIZER_FOLDER}_{i}")
        weights.clear()

    def _load_sharded(self, models: list[nn.Module], folder: str) -> None:
        for i, model in enumerate(models):
            load_model(model, Path(folder) / f"{MODEL_FOLDER}_{i}")
            optimizers = self._optimizers_of(model)
            if optimizers:
                load_optimizers(model, optimizers, Path(folder) / f"{OPTIMIZER_FOLDER}_{i}")
        models.clear()

    def _optimizers_of(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        mine = {id(p) for p in model.parameters()}
        return [o for o in self._dspass_optimizers if any(id(p) in mine for g in o.param_groups for p in g["params"])]


class ShardedTrainer(_Trainer):
    """Over ``transformers.Trainer`` or a subclass of it: ``class Mine(ShardedTrainer, SFTTrainer)``.

    ``config`` is as ``options`` of ``torch.compile(backend="deepspeed")``; a model on which
    ``model.compile(backend="deepspeed", options=...)`` was called needs none. A checkpoint holds the whole model in the
    library's own files, for ``from_pretrained`` (gathered on rank 0's CPU), and the optimiser as every rank holds it; both
    are read on any number of ranks, also a checkpoint that an unsharded ``Trainer`` wrote.
    """

    def __init__(self, *args: Any, config: Options = None, **kwargs: Any) -> None:
        self._dspass_config = config
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Give the accelerator our methods: the ``Trainer`` makes it, and nothing says of which class."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "TrainingArguments asks for DeepSpeed or FSDP, which shard the model themselves. Drop them, and "
                "give the configuration as Trainer(config=...)."
            )
        if self.args.save_on_each_node:
            raise ValueError("save_on_each_node is not supported: the whole model is gathered on rank 0 alone.")
        self.accelerator.__class__ = _over(ShardedAccelerator, type(self.accelerator))
        self.accelerator._plug(self._dspass_config)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if engine_of(model) is None:  # a sharded model lies where it belongs
            super()._move_model_to_device(model, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, so that ``from_pretrained`` reads it. Every rank has to call it; rank 0 writes."""
        state = full_state_dict(cast(nn.Module, self.model))
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizers(cast(nn.Module, self.model), [cast(Any, self.optimizer)], Path(output_dir) / OPTIMIZER_FOLDER)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / _scheduler_file())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER_FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # whole states are sharded before the next step
            return
        load_optimizers(cast(nn.Module, self.model), [cast(Any, self.optimizer)], Path(checkpoint) / OPTIMIZER_FOLDER)
        cast(Any, self.lr_scheduler).load_state_dict(
            torch.load(Path(checkpoint) / _scheduler_file(), weights_only=True)
        )


def _scheduler_file() -> str:
    from transformers.trainer import SCHEDULER_NAME

    return SCHEDULER_NAME


_made: dict[tuple[type, type], Any] = {}


def _over(mixin: type, base: type) -> Any:
    """``mixin`` over ``base``, under the name of the latter; the same class each time."""
    if issubclass(base, mixin):
        return base
    if (mixin, base) not in _made:
        _made[mixin, base] = type(base.__name__, (mixin, base), {"__module__": __name__})
    return _made[mixin, base]


def __getattr__(name: str) -> Any:
    if name == "Accelerator":
        import accelerate

        return _over(ShardedAccelerator, accelerate.Accelerator)
    if name == "Trainer":
        import transformers

        return _over(ShardedTrainer, transformers.Trainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if TYPE_CHECKING:  # what __getattr__ makes

    class Accelerator(ShardedAccelerator): ...

    class Trainer(ShardedTrainer): ...


__all__ = [
    "Accelerator",
    "ShardedAccelerator",
    "ShardedTrainer",
    "Trainer",
    "full_state_dict",
    "load_model",
    "load_optimizers",
    "save_model",
    "save_optimizers",
]
