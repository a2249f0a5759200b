"""One training stage: a loop that can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast a stage trains.

    Attributes:
        name: Names the stage's checkpoint and log.
        steps: Optimiser steps in all.
        learning_rate: Peak learning rate.
        warmup: Steps from zero to the peak.
        decay: Share of the steps, at the end, over which the rate falls linearly to zero.
        ema: Decay of the averaged weights per step.
        save_every: Steps between checkpoints.
    """

    name: str
    steps: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.62
    ema: float = 0.999
    save_every: int = 200


@dataclass(kw_only=True)
class Stage:
    """Everything a stage needs to go on: saved whole, loaded whole.

    Attributes:
        model: The weights being trained.
        ema: A copy of ``model`` that holds the moving average.
        optimizer: The optimiser of ``model``.
        step: Steps done.
        seconds: Time spent training, over all the runs.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def rate(plan: Plan, step: int) -> float:
    """Learning rate of one step: linear warmup, constant, then linearly to zero.

    Because the middle is constant, a run whose ``steps`` change on resume equals one planned that way from
    the start, as long as the decay had not begun.

    Args:
        plan: The stage's plan.
        step: Step about to be done, from 0.

    Returns:
        The rate.

    Source:
        arXiv:2502.15938 (linear decay to zero).
    """
    begin = int(plan.steps * (1 - plan.decay))
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    if step < begin:
        return plan.learning_rate
    return plan.learning_rate * (plan.steps - step) / (plan.steps - begin)


def run_stage(stage: Stage, plan: Plan, loss_of: Callable[[int], Tensor], out: Path) -> bool:
    """Train from where ``stage`` stands to the end of the plan, or until the process is asked to stop.

    Args:
        stage: Advanced in place; a checkpoint in ``out`` is loaded into it first.
        plan: How long and how fast.
        loss_of: Loss of a step; it may depend on nothing but the step and the weights.
        out: Folder for ``<name>.pt`` and ``<name>.jsonl`` (step, loss, seconds).

    Returns:
        True when the plan is done, False when SIGINT or SIGTERM ended it early (after saving).
    """
    load(stage, out / f"{plan.name}.pt")
    mean, since = 0.0, time.monotonic()
    with _stop_requests() as stopped, _bar() as bar:
        task = bar.add_task(plan.name, total=plan.steps, completed=stage.step, loss="")
        while stage.step < plan.steps and not stopped:
            loss = _step(stage, plan, loss_of)
            mean = loss if mean == 0 else 0.98 * mean + 0.02 * loss
            bar.update(task, completed=stage.step, loss=f"loss {mean:.4f}")
            if stage.step % plan.save_every == 0 or stage.step == plan.steps:
                stage.seconds, since = stage.seconds + time.monotonic() - since, time.monotonic()
                save(stage, out / f"{plan.name}.pt")
                _log(out / f"{plan.name}.jsonl", stage, mean)
        stage.seconds += time.monotonic() - since
        if stopped:
            save(stage, out / f"{plan.name}.pt")
    return stage.step >= plan.steps


def save(stage: Stage, path: Path) -> None:
    """Write a checkpoint so that a crash leaves either the old file or the new one."""
    state = {
        "model": stage.model.state_dict(), "ema": stage.ema.state_dict(),
        "optimizer": stage.optimizer.state_dict(), "step": stage.step, "seconds": stage.seconds,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(path)


def load(stage: Stage, path: Path) -> None:
    """Put a checkpoint, if there is one, into ``stage``."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True, map_location="cpu")
    stage.model.load_state_dict(state["model"])
    stage.ema.load_state_dict(state["ema"])
    stage.optimizer.load_state_dict(state["optimizer"])
    stage.step, stage.seconds = state["step"], state["seconds"]
    logger.info("resuming %s at step %d", path.stem, stage.step)


def _step(stage: Stage, plan: Plan, loss_of: Callable[[int], Tensor]) -> float:
    for group in stage.optimizer.param_groups:
        group["lr"] = rate(plan, stage.step)
    loss = loss_of(stage.step)
    stage.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
    stage.optimizer.step()
    stage.step += 1
    # The average starts as the weights themselves and slows down to its final pace.
    weight = 1 - min(plan.ema, (1 + stage.step) / (10 + stage.step))
    averaged: list[Tensor] = list(stage.ema.parameters())
    current: list[Tensor] = list(stage.model.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(averaged, current, weight)
    return float(loss.detach())


def _log(path: Path, stage: Stage, loss: float) -> None:
    with path.open("a") as file:
        file.write(
            json.dumps({"step": stage.step, "loss": round(loss, 5), "seconds": round(stage.seconds)}) + "\n"
        )


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
    )  # fmt: skip


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that a stop signal makes non-empty, so that the running step ends first."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
