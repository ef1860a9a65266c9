"""The Hugging Face Trainer and Accelerate train, clip, accumulate, evaluate, save and resume a sharded model, on real ranks.

The reference is the plain library in one process, on the same rows a step. All that one stage and number of ranks does is
one call of :func:`tests.ranks.run`, as compiling costs more than anything else here.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tests.ranks import run
from tests.training import whole, without_inductor, zero

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY, LENGTH = 61, 12
STEPS, SAVED_AT = 5, 3
BATCH, BATCHES_A_STEP = 2, 4  # a step is four batches of two rows, however many ranks share them
CLIP = 0.1  # below each norm that occurs, so every step is clipped

Found = dict[str, Any]


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            use_cache=False,
        )
    )


def rows(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Counting in steps of one to five: something to learn, so that a lost state shows in the next loss."""
    draw = torch.Generator().manual_seed(seed)
    starts, steps = (
        torch.randint(0, VOCABULARY, (number,), generator=draw),
        torch.randint(1, 6, (number,), generator=draw),
    )
    ids = (starts[:, None] + steps[:, None] * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


def forget() -> None:
    """Accelerate keeps its state for the life of a process; ranks live from test to test."""
    from accelerate.state import AcceleratorState, GradientState
    from tqdm import tqdm
    from transformers.utils import logging

    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, that a killed rank leaves behind
    logging.disable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Whole parameters; arrays, as those travel between processes by value."""
    return {n: whole(p.detach()).clone().numpy() for n, p in model.named_parameters()}


def sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())


def alike(found: Found, expected: Found, skipped: int = 0) -> None:
    """Losses and norms of each step, after ``skipped`` ones, and what came out: within 1e-5 of each other."""
    assert len(expected["losses"]) == STEPS
    assert min(expected["norms"]) > CLIP
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key][skipped:], rel=1e-5), key
    if "evaluated" in found:
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert list(found["parameters"]) == list(expected["parameters"])
    for name, value in expected["parameters"].items():
        assert np.linalg.norm(found["parameters"][name] - value) <= 1e-5 * np.linalg.norm(value), name


def same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


# The Trainer


def trainer(model: Any, folder: str, ranks: int, **config: Any) -> Any:
    """Ours where a ``config`` is given, be it None; else the plain one."""
    import transformers

    from dspass import integrations

    forget()
    args = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=BATCHES_A_STEP // ranks,
        learning_rate=1e-2,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_steps=SAVED_AT,
        report_to=[],
        disable_tqdm=True,
    )
    kind = integrations.Trainer if config else transformers.Trainer
    return kind(model=model, args=args, train_dataset=rows(48, 3), eval_dataset=rows(8, 4), **config)


def train(trainer: Any, resume: str | None = None, evaluate: bool = True) -> Found:
    trainer.train(resume_from_checkpoint=resume)
    first = SAVED_AT if resume else 0  # a resumed history begins with the losses that were saved
    history = [entry for entry in trainer.state.log_history if "loss" in entry][first:]
    answers = {"losses": [entry["loss"] for entry in history], "norms": [entry["grad_norm"] for entry in history]}
    if evaluate:
        answers["evaluated"] = trainer.evaluate()["eval_loss"]
    return {**answers, "parameters": arrays(trainer.model)}


@without_inductor
def trainer_through(folder: str, stage: int) -> Found:
    """Train to the end, saving on the way; then resume with a model of other values, compiled by hand."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first = trainer(llama(10 * rank), folder, ranks, config=zero(stage))  # rank 0's values are handed out
    answers = {
        "through": train(first),
        "unwrapped": first.model_wrapped is first.model,
        "sharded": sharded(first.model),
    }
    first.save_model(f"{folder}/final")
    return {**answers, "resumed": trainer_resumed(f"{folder}/checkpoint-{SAVED_AT}", f"{folder}/resumed", stage)}


@without_inductor
def trainer_resumed(checkpoint: str, folder: str, stage: int, evaluate: bool = False) -> Found:
    model = llama(7)
    model.compile(backend="deepspeed", options=zero(stage))
    return train(trainer(model, folder, dist.get_world_size(), config=None), checkpoint, evaluate)


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Found]:
    """The library's own in this process: its folder, and what it found."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return folder, train(trainer(llama(0), folder, 1))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Found]]:
    folder = str(tmp_path_factory.mktemp("trainer"))
    return folder, run(request.param, trainer_through, folder, 3)


def test_trainer_agrees_with_the_plain_one(trained: tuple[str, list[Found]], plain_trainer: tuple[str, Found]) -> None:
    for found in trained[1]:
        assert found["unwrapped"]
        assert found["sharded"] == (len(trained[1]) > 1)
        alike(found["through"], plain_trainer[1])


def test_trainer_resumes(trained: tuple[str, list[Found]]) -> None:
    for found in trained[1]:
        alike(found["resumed"], found["through"], SAVED_AT)


def test_what_the_trainer_saved_loads_in_one_process(trained: tuple[str, list[Found]]) -> None:
    from transformers import LlamaForCausalLM

    folder, results = trained
    for saved in ("final", f"checkpoint-{STEPS}"):
        same_arrays(arrays(LlamaForCausalLM.from_pretrained(f"{folder}/{saved}")), results[0]["through"]["parameters"])


def test_trainer_at_stage_1_resumes_what_the_plain_one_saved(plain_trainer: tuple[str, Found], tmp_path: Path) -> None:
    folder, expected = plain_trainer
    for found in run(2, trainer_resumed, f"{folder}/checkpoint-{SAVED_AT}", str(tmp_path), 1, evaluate=True):
        alike(found, expected, SAVED_AT)


# Accelerate


def loop(
    folder: str, model: Any, accelerator: Any, ranks: int, resume: str | None = None, evaluate: bool = True
) -> Found:
    """A training loop as people write it; ``folder`` gets a state after ``SAVED_AT`` steps."""
    from torch.utils.data import DataLoader

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    data, test = DataLoader(rows(48, 3), batch_size=BATCH, shuffle=True), DataLoader(rows(7, 4), batch_size=BATCH)
    model, optimizer, data, test, schedule = accelerator.prepare(model, optimizer, data, test, schedule)
    done = 0
    if resume:
        accelerator.load_state(resume)
        accelerator.step = 0  # the number of batches that was saved counts those of other ranks, if there were others
        done = SAVED_AT
        data = accelerator.skip_first_batches(data, SAVED_AT * BATCHES_A_STEP // ranks)
    losses, norms, total = [], [], torch.zeros(())
    model.train()
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            total += loss.detach() / BATCHES_A_STEP * ranks
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIP).item())
                losses.append(accelerator.reduce(total, "mean").item())
                total.zero_()
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            schedule.step()
            done += 1
            if done == SAVED_AT and not resume:
                accelerator.save_state(folder)
            if done == STEPS:
                break
    answers = {"losses": losses, "norms": norms, "parameters": arrays(accelerator.unwrap_model(model))}
    if evaluate:
        model.eval()
        each = []
        for batch in test:
            with torch.no_grad():
                logits = model(**batch).logits
            loss = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none").mean(1)
            each.append(accelerator.gather_for_metrics(loss))
        answers["evaluated"] = torch.cat(each).tolist()
    return answers


def accelerator_of(ranks: int, **config: Any) -> Any:
    """Ours where a ``config`` is given, be it None; else the plain one."""
    import accelerate
    from accelerate.utils import DataLoaderConfiguration

    from dspass import integrations

    forget()
    kind = integrations.Accelerator if config else accelerate.Accelerator
    return kind(
        cpu=True,
        step_scheduler_with_optimizer=False,  # else a schedule goes on by the number of ranks, which is to change here
        gradient_accumulation_steps=BATCHES_A_STEP // ranks,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
        **config,
    )


@without_inductor
def accelerate_through(folder: str, stage: int) -> Found:
    """Train to the end, saving on the way; then load the state into a model of other values, compiled by hand."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accelerator, model = accelerator_of(ranks, config=zero(stage)), llama(10 * rank)
    answers = {"through": loop(f"{folder}/state", model, accelerator, ranks), "sharded": sharded(model)}
    answers["unwrapped"] = accelerator._models == [model]
    accelerator.save_model(model, f"{folder}/final")
    answers["state dict"] = {n: v.numpy() for n, v in accelerator.get_state_dict(model).items()}
    return {**answers, "resumed": accelerate_resumed(f"{folder}/state", stage)}


@without_inductor
def accelerate_resumed(state: str, stage: int, evaluate: bool = False) -> Found:
    ranks, model = dist.get_world_size(), llama(7)
    model.compile(backend="deepspeed", options=zero(stage))
    return loop("", model, accelerator_of(ranks, config=None), ranks, state, evaluate)


@pytest.fixture(scope="module")
def plain_loop(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return loop(str(tmp_path_factory.mktemp("plain")), llama(0), accelerator_of(1), 1)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def looped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Found]]:
    folder = str(tmp_path_factory.mktemp("accelerate"))
    return folder, run(request.param, accelerate_through, folder, 3)


def test_accelerate_agrees_with_the_plain_one(looped: tuple[str, list[Found]], plain_loop: Found) -> None:
    for found in looped[1]:
        assert found["unwrapped"]
        assert found["sharded"] == (len(looped[1]) > 1)
        assert len(found["through"]["evaluated"]) == 7
        alike(found["through"], plain_loop)


def test_accelerate_resumes(looped: tuple[str, list[Found]]) -> None:
    for found in looped[1]:
        alike(found["resumed"], found["through"], SAVED_AT)


def test_what_accelerate_saved_loads_in_one_process(looped: tuple[str, list[Found]]) -> None:
    from safetensors.torch import load_file

    folder, results = looped
    model = llama(7)
    model.load_state_dict(load_file(f"{folder}/final/model.safetensors"))
    same_arrays(arrays(model), results[0]["through"]["parameters"])
    same_arrays(results[0]["state dict"], results[0]["through"]["parameters"])
    assert not any(found["state dict"] for found in results[1:])


def test_a_state_moves_between_ranks_and_stages(looped: tuple[str, list[Found]]) -> None:
    folder, results = looped
    for found in run(3 - len(results), accelerate_resumed, f"{folder}/state", 0):
        alike(found, results[0]["through"], SAVED_AT)


# What is refused, and the page


def refusals(folder: str) -> dict[str, str]:
    import transformers
    from accelerate.state import DistributedType
    from accelerate.utils import DataLoaderConfiguration

    from dspass import integrations

    def compiled_twice() -> None:
        model = llama(0)
        model.compile(backend="deepspeed", options=zero(3))
        accelerator_of(2, config=zero(3)).prepare(model)

    def another_backend() -> None:
        model, accelerator = llama(0), accelerator_of(2, config=None)
        model.compile(backend="eager")
        batch = {name: value[None] for name, value in rows(1, 0)[0].items()}
        accelerator.backward(accelerator.prepare(model)(**batch).loss)

    def set_up_for_fsdp() -> None:
        accelerator = accelerator_of(2, config=None)
        accelerator.state.distributed_type = DistributedType.FSDP  # on CPUs Accelerate does not get there by itself
        accelerator._plug(None)

    def saved_on_each_node() -> None:
        args = transformers.TrainingArguments(output_dir=folder, use_cpu=True, save_on_each_node=True, report_to=[])
        integrations.Trainer(model=llama(0), args=args)

    cases = {
        "config": compiled_twice,
        "backend": another_backend,
        "even_batches": lambda: integrations.Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False)
        ),
        "fsdp": set_up_for_fsdp,
        "save_on_each_node": saved_on_each_node,
    }
    said = {}
    for name, case in cases.items():
        forget()
        with pytest.raises((ValueError, RuntimeError)) as refusal:
            case()
        said[name] = str(refusal.value)
    return said


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for said in run(2, refusals, str(tmp_path)):
        assert "a config was given beside it" in said["config"]
        assert "another backend than 'deepspeed'" in said["backend"]
        assert "Leave even_batches at True" in said["even_batches"]
        assert "set up for FSDP" in said["fsdp"]
        assert "save_on_each_node is not supported" in said["save_on_each_node"]


RECIPES = re.findall(
    r"^```python\n# file: (\S+)\n(.*?)^```$",
    (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


@without_inductor
def paste(name: str, text: str, folder: str, *arguments: str) -> None:
    forget()
    has_group = mock.patch.object(torch.distributed, "init_process_group")
    with contextlib.chdir(folder), has_group, mock.patch.object(sys, "argv", [name, *arguments]):
        exec(compile(text, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes_run(name: str, text: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run(1, paste, name, text, str(tmp_path))
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "final" / "model.safetensors")


def test_the_plain_loop_resumes_on_fewer_ranks(tmp_path: Path) -> None:
    name, text = RECIPES[0]
    run(2, paste, name, text, str(tmp_path))
    run(1, paste, name, text, str(tmp_path), "out/state")


def test_the_recipes_are_on_the_page() -> None:
    assert [name for name, _ in RECIPES] == ["plain.py", "train.py", "loop.py"]
