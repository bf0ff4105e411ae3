"""The implementations of the ops, and the choice between them.

Every backend is a module with the same functions:

    unavailable_reason() -> str | None                  why it can't run here
    supports(device_type, options) -> bool              whether it takes that device and widths
    pack_bits(codes, bits)                              unpack_bits(packed, bits, channels, signed)
    quantize_pack(x, out)                               unpack_dequantize(packed)
    quantize_weight(weight, scale, bits, centred, out)  retile_weight(weight, geometry)
    tile_bytes(geometry, options, centred) -> int       size of its private weights; 0 for none
    tile_variant() -> str | None                        tells apart its weights; None: has none
    mixed_conv2d(call, out)                             mixed_conv2d_backward(call, grad, wanted)
    rnn_gate(call, out)                                 one step of a gate, dfs_kernels/gate.py
    info() -> dict                                      what runs, for people

and "reference" and "cpu" two more, which serve all:

    fake_quantize(x, bits, scale, zero_point)           fake_quantize_backward(grad, x, bits, ...)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from dfs_kernels.backends import cpu, cuda, cuda_bits, measured, reference, triton
from dfs_kernels.backends.measured import ConvProblem

# Modules at hand rather than imported on demand: torch.compile can't trace an import.
_MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "cuda-bits": cuda_bits,
}
_NAMES = tuple(_MODULES)

# Which backend an op takes on a device when nobody asks for one, best first. On a GPU with a table
# of what is faster the convolutions in it take that: see measured.py.
_DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}

_override: str | None = None
_announced: set[str] = set()


class BackendScope:
    """Undoes :func:`use_backend` when used as a context manager."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _override
        _override = self._previous


def use_backend(name: str | None) -> BackendScope:
    """Make every op run on one backend; None goes back to the defaults.

    Also a context manager: ``with use_backend("reference"): ...``.

    Raises:
        ValueError: no such backend, or one that can't run here.
    """
    global _override
    if name is not None:
        _check_usable(name)
    previous, _override = _override, name
    return BackendScope(previous)


def load(name: str) -> ModuleType:
    """The module of a backend."""
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {_NAMES}, got {name!r}")
    return _MODULES[name]


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run here."""
    return tuple(name for name in _NAMES if load(name).unavailable_reason() is None)


def backend_info() -> dict[str, Any]:
    """What each backend runs on, or why it does not, the defaults in force, and what chooses them.

    "defaults" has the first choice for each type of device, "choice" for each GPU, in words, which
    backend a convolution takes and why.
    """
    info: dict[str, Any] = {}
    for name in _NAMES:
        reason = load(name).unavailable_reason()
        info[name] = {"available": reason is None}
        info[name].update({"reason": reason} if reason else load(name).info())
    info["defaults"] = {device: _override or names[0] for device, names in _DEFAULTS.items()}
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    info["choice"] = {str(gpu): _describe_choice(gpu) for gpu in gpus} or {"cuda": "no GPU"}
    return info


def _describe_choice(device: torch.device) -> str:
    if _override is not None:
        return f"{_override} throughout: it was asked for"
    order = _DEFAULTS[device.type]
    usable = [name for name in order if load(name).unavailable_reason() is None]
    return measured.describe(device, usable)


def select_name(
    op: str,
    requested: str | None,
    device: torch.device,
    options: Sequence[int],
    problem: ConvProblem | None = None,
) -> str:
    """The backend that an op will run on.

    Args:
        problem: the convolution, of packed weights, that decides its time.

    Raises:
        ValueError: a backend that was asked for can't run here or does not take the widths.
    """
    asked = requested if requested is not None else _override
    if asked is not None:
        _check_usable(asked)
        if not load(asked).supports(device.type, options):
            raise ValueError(
                f"backend {asked!r} does not take {tuple(options)} bits on {device.type} tensors"
            )
        return asked
    order = _default_order(op, device.type)
    # What is measured are integer widths.
    if problem is not None and min(options) < 32:
        order = measured.order_for(order, device, problem)
    for name in order:
        module = load(name)
        if module.unavailable_reason() is None and module.supports(device.type, options):
            return name
        _announce(op, name, device, options)
    return "reference"


def _default_order(op: str, device_type: str) -> tuple[str, ...]:
    order = _DEFAULTS.get(device_type, ("reference",))
    if op == "mixed_conv2d_backward" and order[0] == "cpu" and cpu.has_slow_backward():
        return tuple(reversed(order))
    return order


def is_compiled_cpu(requested: str | None) -> bool:
    """Whether an op on CPU tensors at kernel widths will run on the compiled kernels."""
    asked = requested if requested is not None else _override
    if asked is None:
        asked = _DEFAULTS["cpu"][0]
    return asked == "cpu" and cpu.unavailable_reason() is None


def select(
    op: str, requested: str | None, device: torch.device, options: Sequence[int]
) -> ModuleType:
    """Like :func:`select_name`, giving the module."""
    return load(select_name(op, requested, device, options))


def _check_usable(name: str) -> None:
    reason = load(name).unavailable_reason()
    if reason is not None:
        raise ValueError(f"backend {name!r} can't run here: {reason}")


def _announce(op: str, name: str, device: torch.device, options: Sequence[int]) -> None:
    reason = load(name).unavailable_reason()
    if reason is None:
        reason = f"it does not take {tuple(options)} bits on {device.type} tensors"
    # A forward and its backward are one matter to who reads this.
    op = op.removesuffix("_backward")
    message = f"{op}: the {name!r} backend is not used ({reason}); a slower one takes its place"
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
