"""What the paper's authors' network computes, written anew from its description.

The layout is that of their checkpoints; the mathematics are those of their code in evaluation, with
the rounding of activations made deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


def authors_state(per_group: int, classes: int, options: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict in their layout, aliases and tensors without a use included.

    Gates are steep, so that decisions differ between inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def conv(name: str, c_in: int, c_out: int, kernel: int) -> None:
        state[f"{name}.weight"] = normal(
            c_out, c_in, kernel, kernel, std=(2 / (c_in * kernel**2)) ** 0.5
        )
        state[f"{name}.quantize_input.running_min"] = uniform(-0.5, 0.0, 1)
        state[f"{name}.quantize_input.running_max"] = uniform(2.0, 5.0, 1)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = uniform(0.5, 1.0, channels)
        state[f"{name}.bias"] = uniform(-0.2, 0.3, channels)
        state[f"{name}.running_mean"] = uniform(-0.3, 0.3, channels)
        state[f"{name}.running_var"] = uniform(0.5, 2.0, channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(100)

    def same(alias: str, name: str) -> None:
        for key in [k for k in state if k.startswith(f"{name}.")]:
            state[alias + key.removeprefix(name)] = state[key]

    conv("conv1", 3, 16, 3)
    norm("bn1", 16)
    c_in = 16
    for g, c_out in enumerate(WIDTHS, 1):
        for i in range(per_group):
            layer = f"group{g}_layer{i}"
            conv(f"{layer}.conv1", c_in, c_out, 3)
            conv(f"{layer}.conv2", c_out, c_out, 3)
            for n in (1, 2, 3):
                norm(f"{layer}.bn{n}", c_out)
            if g > 1 and i == 0:
                conv(f"{layer}.downsample", c_in, c_out, 1)
                same(f"group{g}_ds{i}", f"{layer}.downsample")
                same(f"group{g}_bn{i}", f"{layer}.bn3")
            state[f"group{g}_gate{i}.1.weight"] = normal(10, c_out, 1, 1, std=2.0)
            state[f"group{g}_gate{i}.1.bias"] = normal(10)
            c_in = c_out
    for name, shape in (("weight_ih", (40, 10)), ("weight_hh", (40, 10))):
        state[f"control.rnn_one.{name}_l0"] = normal(*shape)
    for name in ("bias_ih", "bias_hh"):
        state[f"control.rnn_one.{name}_l0"] = normal(40)
    state["control.proj.weight"] = normal(options, 10, std=5.0)
    state["control.proj.bias"] = normal(options)
    state["fc.weight"] = normal(classes, 64, std=0.2)
    state["fc.bias"] = normal(classes)
    return state


def _fake(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    top = 2.0**bits - 1
    step = max(float(high - low) / top, 1e-8)
    return ((x - low) / step).clamp(0, top).round() * step + low


def _conv(
    state: dict[str, Tensor], name: str, x: Tensor, bits: int, stride: int, padding: int
) -> Tensor:
    """Their 0 bits are full precision."""
    weight = state[f"{name}.weight"]
    if bits:
        low, high = (state[f"{name}.quantize_input.running_{end}"] for end in ("min", "max"))
        x = _fake(x, bits, low, high)
        weight = _fake(weight, bits, weight.min(), weight.max())
    return F.conv2d(x, weight, None, stride, padding)


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


def _block(state: dict[str, Tensor], g: int, i: int, x: Tensor, bits: int) -> Tensor:
    name, down = f"group{g}_layer{i}", g > 1 and i == 0
    y = torch.relu(_norm(state, f"{name}.bn1", _conv(state, f"{name}.conv1", x, bits, 1 + down, 1)))
    y = _norm(state, f"{name}.bn2", _conv(state, f"{name}.conv2", y, bits, 1, 1))
    if down:
        x = _norm(state, f"{name}.bn3", _conv(state, f"{name}.downsample", x, bits, 2, 0))
    return torch.relu(x + y)


def authors_forward(
    state: dict[str, Tensor], per_group: int, images: Tensor, bits: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Logits, and the index of every gated block's choice: 0 skips, k takes ``bits[k - 1]``."""
    cell = nn.LSTM(10, 10)
    prefix = "control.rnn_one."
    cell.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    cell.to(images.dtype)
    hidden = None
    x = torch.relu(_norm(state, "bn1", _conv(state, "conv1", images, 0, 1, 1)))
    chosen = []
    for g in (1, 2, 3):
        for i in range(per_group):
            if (g, i) == (1, 0):
                x = _block(state, g, i, x, 0)
            else:
                carried = x
                if g > 1 and i == 0:
                    carried = _norm(
                        state, f"group{g}_bn{i}", _conv(state, f"group{g}_ds{i}", x, 0, 2, 0)
                    )
                results = torch.stack([carried, *(_block(state, g, i, x, b) for b in bits)])
                x = results[chosen[-1], torch.arange(len(x))]
            gate = f"group{g}_gate{i}.1"
            embedded = F.linear(
                x.mean((2, 3)), state[f"{gate}.weight"].flatten(1), state[f"{gate}.bias"]
            )
            output, hidden = cell(embedded[None], hidden)
            logits = F.linear(output[0], state["control.proj.weight"], state["control.proj.bias"])
            chosen.append(logits.argmax(1))
    logits = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    # The last gate decides nothing.
    return logits, torch.stack(chosen[:-1], 1)
