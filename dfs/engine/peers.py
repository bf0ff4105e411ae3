"""Other ways to run a static network of the same shape, as their users would best call them.

ONNX Runtime and OpenVINO are extras: ``pip install -e '.[peers]'``. Both run the same two files:
the float32 network, and its static int8 form in QDQ with a step for each output channel.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfs.models import PlainResNet
from dfs.models.architecture import Architecture
from dfs.nn.shapes import Size

_OPSET = 17
_CALIBRATION_BATCHES, _CALIBRATION_BATCH = 4, 8
_HOW_TO_INSTALL = "pip install -e '.[peers]'"

# A batch of images to its logits.
Call = Callable[[], Any]


class PeerUnavailableError(Exception):
    """Why a peer can't run here, in one line."""


@dataclass(frozen=True)
class Peer:
    """A way to run a static network.

    Attributes:
        name: its key in results.
        label: its name for people.
        prepare: from a network, images and threads to a call that classifies these images; raises
            :class:`PeerUnavailableError`.
        many_only: whether it is of use for more than one image only.
    """

    name: str
    label: str
    prepare: Callable[[StaticNetwork, Tensor, int], Call]
    many_only: bool = False


class StaticNetwork:
    """A float32 network of some architecture with random weights, and its ONNX forms.

    Args:
        image_size: (H, W).
        seed: of the weights and of the images that the int8 form is calibrated with.
    """

    def __init__(self, architecture: Architecture, image_size: Size, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = PlainResNet(architecture).eval()
        self.shape = (architecture.in_channels, *image_size)
        self._settle()

    def images(self, count: int) -> Tensor:
        """Random ones, float32 (count, C, H, W)."""
        return torch.randn(count, *self.shape, generator=self.generator)

    @cached_property
    def float_file(self) -> bytes:
        """ONNX, float32.

        Raises:
            PeerUnavailableError: the onnx package is missing.
        """
        _require("onnx")
        with tempfile.TemporaryDirectory() as folder, _quietly():
            path = Path(folder, "float.onnx")
            torch.onnx.export(
                self.model,
                (self.images(1),),
                str(path),
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
                dynamo=False,
                opset_version=_OPSET,
            )
            return path.read_bytes()

    @cached_property
    def int8_file(self) -> bytes:
        """ONNX, static int8: QDQ, unsigned activations, a step per output channel of the weights.

        Raises:
            PeerUnavailableError: onnx or onnxruntime is missing.
        """
        _require("onnx", "onnxruntime")
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory() as folder, _quietly():
            paths = [Path(folder, f"{name}.onnx") for name in ("float", "prepared", "int8")]
            paths[0].write_bytes(self.float_file)
            quant_pre_process(str(paths[0]), str(paths[1]), skip_symbolic_shape=True)
            quantize_static(
                str(paths[1]),
                str(paths[2]),
                _Batches([self.images(_CALIBRATION_BATCH) for _ in range(_CALIBRATION_BATCHES)]),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return paths[2].read_bytes()

    @torch.no_grad()
    def _settle(self) -> None:
        """BatchNorm's statistics from random images, so that activations keep an ordinary size."""
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.train()
        self.model(self.images(_CALIBRATION_BATCH))
        self.model.eval()


class _Batches:
    """Calibration images, as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch.numpy()}


def _torch_eager(network: StaticNetwork, images: Tensor, threads: int) -> Call:
    model = network.model

    def call() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
        return logits

    return call


def _torch_compiled(network: StaticNetwork, images: Tensor, threads: int) -> Call:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise PeerUnavailableError("torch.compile needs a C++ compiler")
    # Compiled code belongs to one batch size and number of threads, and dynamo keeps a few only.
    torch._dynamo.reset()
    model = torch.compile(network.model, dynamic=False)

    def call() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
        return logits

    call()
    return call


def _onnxruntime(int8: bool) -> Callable[[StaticNetwork, Tensor, int], Call]:
    def prepare(network: StaticNetwork, images: Tensor, threads: int) -> Call:
        _require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin after a call would take the processor from whoever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        content = network.int8_file if int8 else network.float_file
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        inputs = {"x": images.numpy()}
        return lambda: session.run(None, inputs)[0]

    return prepare


def _openvino(int8: bool, hint: str) -> Callable[[StaticNetwork, Tensor, int], Call]:
    """A network compiled for just this batch; THROUGHPUT shares it out among several requests."""

    def prepare(network: StaticNetwork, images: Tensor, threads: int) -> Call:
        _require("openvino")
        import openvino

        core = openvino.Core()
        content = network.int8_file if int8 else network.float_file
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": hint}
        if not int8:
            # Where a processor has them it would take bfloat16 instructions.
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        parts = 1 if hint == "LATENCY" else min(threads, len(images))
        shares = [share.numpy() for share in images.tensor_split(parts)]
        compiled: dict[int, Any] = {}
        requests = []
        for share in shares:
            size = len(share)
            if size not in compiled:
                model = core.read_model(content, b"")
                model.reshape([size, *network.shape])
                compiled[size] = core.compile_model(model, "CPU", settings)
            requests.append((compiled[size].create_infer_request(), share))

        def call() -> Any:
            for request, share in requests:
                request.start_async({0: share}, share_inputs=True)
            for request, _ in requests:
                request.wait()
            return np.concatenate([r.get_output_tensor(0).data for r, _ in requests])

        def call_alone() -> Any:
            request, share = requests[0]
            return request.infer({0: share}, share_inputs=True, share_outputs=True)[0]

        return call_alone if len(requests) == 1 else call

    return prepare


PEERS = tuple(
    Peer(*fields)
    for fields in (
        ("torch_eager", "PyTorch eager float32", _torch_eager),
        ("torch_compile", "torch.compile float32", _torch_compiled),
        ("onnxruntime_float32", "ONNX Runtime float32", _onnxruntime(int8=False)),
        ("onnxruntime_int8", "ONNX Runtime int8", _onnxruntime(int8=True)),
        ("openvino_float32", "OpenVINO float32", _openvino(False, "LATENCY")),
        ("openvino_int8", "OpenVINO int8", _openvino(True, "LATENCY")),
        ("openvino_int8_streams", "OpenVINO int8, THROUGHPUT", _openvino(True, "THROUGHPUT"), True),
    )
)


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise PeerUnavailableError(f"{package} is missing; {_HOW_TO_INSTALL}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the advice that exporters and quantizers give about how they are called."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
