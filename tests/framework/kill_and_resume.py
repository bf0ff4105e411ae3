"""Kill training at random moments, resume it, and compare it with an undisturbed run.

    python -m tests.framework.kill_and_resume --runs 20 --kills 3 --seed 0

Prints a JSON object: the steps of an undisturbed run, and for every disturbed one how often it was
killed, the steps it executed in all, and whether its checkpoint is the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dfs.train import Trainer
from dfs.train.checkpoint import load_checkpoint
from tests.framework.helpers import TINY, equal_content, tiny_data

CONFIG = replace(
    TINY,
    float_lr=0.02,
    switch_lr=0.002,
    float_epochs=20,
    switch_epochs=10,
    gate_epochs=10,
    joint_epochs=10,
)
_CHECKPOINT = "checkpoint.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # No threads in this process, so that it can be forked.
    torch.set_num_threads(1)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        straight = Path(scratch) / "straight"
        start = time.monotonic()
        os.waitpid(_start(straight), 0)
        took = time.monotonic() - start
        expected = load_checkpoint(straight / _CHECKPOINT)
        disturbed = []
        for index in range(given.runs):
            folder = Path(scratch) / str(index)
            killed = _disturb(folder, given.kills, took)
            same = equal_content(load_checkpoint(folder / _CHECKPOINT), expected)
            disturbed.append({"killed": killed, "steps": _executed(folder), "same": same})
    print(json.dumps({"steps": _executed_of(expected), "seconds": took, "disturbed": disturbed}))


def _start(folder: Path) -> int:
    """A process that begins or takes up the run in ``folder``; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        data = tiny_data()
        exists = (folder / _CHECKPOINT).exists()
        trainer = Trainer.load(folder, data) if exists else Trainer(CONFIG, folder, data)
        folder.mkdir(exist_ok=True)
        with open(folder / "executed", "a", encoding="ascii") as executed:
            trainer.run(progress=lambda *_: print(end=".", file=executed, flush=True))
        code = 0
    finally:
        os._exit(code)


def _disturb(folder: Path, kills: int, seconds: float) -> int:
    """Train, killed at random moments; returns how often it was before it had finished."""
    killed = 0
    for _ in range(kills):
        child = _start(folder)
        time.sleep(random.uniform(0, seconds / kills))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    _, status = os.waitpid(_start(folder), 0)
    if status:
        raise RuntimeError(f"the last process ended with status {status}")
    return killed


def _executed(folder: Path) -> int:
    return (folder / "executed").stat().st_size


def _executed_of(content: dict[str, object]) -> int:
    trainer = Trainer(CONFIG, None, tiny_data())
    assert content["stage"] == len(trainer.stages)
    return sum(stage.length(CONFIG, trainer.data) for stage in trainer.stages)


if __name__ == "__main__":
    main()
