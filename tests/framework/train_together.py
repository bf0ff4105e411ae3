"""What test_distributed starts: one process of several that train together.

Arguments: rank, processes, a folder. It takes one step from each run in ``starts``, trains one from
the beginning through the float stage, and leaves losses and weights in ``RANK.pt``.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dfs.train import Trainer
from tests.framework.helpers import TINY, tiny_data

CONFIG = replace(TINY, float_lr=0.02, switch_lr=0.002)


def main() -> None:
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if count > 1:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    found = {}
    for start in sorted((folder.parent / "starts").iterdir()):
        own = shutil.copytree(start, folder / f"{start.name}-{rank}")
        found[start.name] = _train(Trainer.load(own, tiny_data()), None, 1)
    run = Trainer(CONFIG, folder / "run", tiny_data())
    found["from the beginning"] = _train(run, 1, None)
    torch.save(found, folder / f"{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


def _train(trainer: Trainer, until: int | None, steps: int | None) -> dict[str, object]:
    curve: list[dict[str, float]] = []

    def progress(stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        curve.append(measured)

    trainer.run(until, progress, max_steps=steps)
    weights = {**trainer.model.state_dict(), **trainer.plain.state_dict(prefix="plain.")}
    return {"curve": curve, "weights": weights}


if __name__ == "__main__":
    main()
