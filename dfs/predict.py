"""What a trained network says of pictures, and what each of them costs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dfs.cost import BitOps, Cost, PaperCost
from dfs.data import Preprocessing
from dfs.data.picture import PictureError, network_pixels
from dfs.engine import load_engine
from dfs.train.network import load_network

# Normalized images (N, C, H, W) to logits (N, classes) and bits (N, gated blocks).
Classifier = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prediction:
    """What was found for one picture.

    Attributes:
        confidence: softmax probability of the class.
        bits: the width of every gated block.
        costs: fractions of the full-precision network, by the measure's name.
        milliseconds: of the network, run on this picture alone.
    """

    path: str
    label: int
    class_name: str
    confidence: float
    bits: tuple[int, ...]
    costs: Mapping[str, float]
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network, eager or compiled, and what must be known to give it pictures.

    Args:
        choices: ascending widths that it decides between.
        costs: measures of a decision, by name.
    """

    classify: Classifier
    preprocessing: Preprocessing
    choices: tuple[int, ...]
    costs: Mapping[str, Cost]

    @staticmethod
    def from_checkpoint(path: Path, device: torch.device | str = "cpu") -> Predictor:
        """The network of a finished run's folder or a checkpoint file.

        Raises:
            CheckpointError: it can't be used.
        """
        network = load_network(path)
        model, side = network.model.to(device), network.preprocessing.size

        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            out = model.run(images.to(device))
            return out.logits.cpu(), out.bits.cpu()

        costs = {"paper_cost": PaperCost(model), "bitops": BitOps(model, (side, side))}
        return Predictor(classify, network.preprocessing, model.choices, costs)

    @staticmethod
    def from_engine(path: Path, device: torch.device | str = "cpu") -> Predictor:
        """A frozen network.

        Raises:
            ValueError: the file can't be used, or does not say what pictures its network takes.
            DeviceError: there is no such GPU.
        """
        engine = load_engine(path, device)
        if engine.preprocessing is None:
            raise ValueError(f"{path} doesn't say how pictures become its network's input")
        for name in ("paper", "bitops"):
            if name not in engine.costs:
                raise ValueError(f"{path} doesn't say what decisions cost: {name!r} is missing")

        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            out = engine(images.to(engine.device))
            return out.logits.cpu(), out.bits.cpu()

        costs = {"paper_cost": engine.costs["paper"], "bitops": engine.costs["bitops"]}
        return Predictor(classify, engine.preprocessing, engine.choices, costs)

    def predict(self, paths: Sequence[Path]) -> Iterator[Prediction | PictureError]:
        """Look at pictures one by one; one that can't be read gives its error instead."""
        warm = False
        for path in paths:
            try:
                pixels = network_pixels(path, self.preprocessing)
            except PictureError as error:
                yield error
                continue
            image = self.preprocessing.normalize(pixels[None])
            if not warm:
                self.classify(image)
                warm = True
            yield self._predict(path, image)

    @torch.no_grad()
    def _predict(self, path: Path, image: Tensor) -> Prediction:
        start = time.perf_counter()
        logits, bits = self.classify(image)
        milliseconds = (time.perf_counter() - start) * 1e3
        mask = (bits[..., None].cpu() == torch.tensor(self.choices)).double()
        confidence, label = logits[0].double().softmax(0).max(0)
        return Prediction(
            str(path),
            int(label),
            self.preprocessing.class_names[int(label)],
            float(confidence),
            tuple(bits[0].tolist()),
            {name: float(cost(mask)) for name, cost in self.costs.items()},
            milliseconds,
        )


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """A row per picture."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class")
    for column in ("confidence\n%", "paper\ncost %", "BitOPs\n%", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits of every block", overflow="fold")
    for found in predictions:
        costs = found.costs
        table.add_row(
            found.path,
            found.class_name,
            f"{found.confidence * 100:.2f}",
            f"{costs['paper_cost'] * 100:.2f}",
            f"{costs['bitops'] * 100:.2f}",
            f"{found.milliseconds:.2f}",
            " ".join(map(str, found.bits)),
        )
    return table
