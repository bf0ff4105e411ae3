"""Making a dynamic network out of a trained one of torchvision's or timm's structure."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfs.models import Architecture, DynamicResNet, PlainResNet
from dfs.nn.shapes import BlockShape, ConvShape, PoolShape

# How far the converted network's logits may be from the original's, relative to the largest.
_TOLERANCE = 1e-3
# Names of the parts of a residual block that the networks at hand use.
_SHORTCUTS = ("downsample", "shortcut")
# Dropout and the like do nothing in evaluation; what trains the result has its own regularization.
_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout2d)
_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Flatten, *_NO_OPS)


def make_dynamic(
    model: nn.Module,
    choices: Sequence[int] = (0, 2, 4, 8),
    *,
    image_size: tuple[int, int] | None = None,
    **options: Any,
) -> DynamicResNet:
    """A dynamic network with the weights of a residual network, which is left as it is.

    The structure is read from the modules, in the order of their definition: a convolution with its
    BatchNorm (perhaps ReLU and max pool), residual blocks, global average pooling, a linear layer.
    A residual block is a module with ``conv1, bn1, conv2, bn2`` (and ``conv3, bn3``), and perhaps a
    ``downsample`` or ``shortcut`` of a convolution and a BatchNorm. What its forward does is not
    read but compared: at full precision the result must give the original's logits.

    ResNets, Wide ResNets and ResNeXts of torchvision and timm convert. :meth:`full_precision` of
    the result equals the original to float tolerance; calibrate it (:func:`dfs.calibrate`) before
    it runs at other widths, and train it for the lowest.

    Args:
        model: float32, or a :class:`PlainResNet`.
        choices: ascending widths on offer.
        image_size: (H, W) at which the logits are compared, for networks that take one size only;
            by default 32x32, or 64x64 for a stem that shrinks the image.
        options: further ones of :class:`DynamicResNet`.

    Raises:
        ValueError: naming the module that is not supported, or saying that the logits differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    plain = model if isinstance(model, PlainResNet) else _to_plain(model, image_size)
    dynamic = DynamicResNet(plain.architecture, choices=choices, **options)
    dynamic.load_plain(plain)
    device = next(model.parameters()).device
    return dynamic.to(device).train(model.training)


@dataclass(frozen=True)
class _Layer:
    """A convolution and its BatchNorm, and what that is called."""

    norm_name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def shape(self) -> ConvShape:
        conv = self.conv
        (kernel, *_), (stride, *_), (dilation, *_) = conv.kernel_size, conv.stride, conv.dilation
        padding = conv._reversed_padding_repeated_twice[0]
        return ConvShape(
            conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups
        )


@dataclass(frozen=True)
class _Block:
    layers: tuple[_Layer, ...]
    shortcut: _Layer | None

    @property
    def shape(self) -> BlockShape:
        shortcut = None if self.shortcut is None else self.shortcut.shape
        return BlockShape(tuple(layer.shape for layer in self.layers), shortcut)


def _to_plain(model: nn.Module, image_size: tuple[int, int] | None) -> PlainResNet:
    """The plain network of the same structure and weights, compared with the original."""
    reader = _Reader(model)
    stem = _layer(*reader.take("a convolution", nn.Conv2d), *reader.take("its BatchNorm"))
    reader.skip(nn.ReLU)
    pool = reader.skip(nn.MaxPool2d)
    blocks = []
    while reader.is_block():
        blocks.append(_read_block(*reader.take("a residual block")))
    if len(blocks) < 2:
        raise reader.unexpected("a residual block, of which at least 2 are needed")
    reader.skip_pooling()
    _, head = reader.take("a linear layer", nn.Linear)
    assert isinstance(head, nn.Linear)
    reader.finish()
    layers = [stem, *(layer for block in blocks for layer in block.layers)]
    layers += [block.shortcut for block in blocks if block.shortcut is not None]
    odd = next((layer for layer in layers if layer.norm.eps != stem.norm.eps), None)
    if odd is not None:
        raise _unsupported(odd.norm_name, odd.norm, f"eps differs from the stem's {stem.norm.eps}")
    architecture = Architecture(
        stem.shape,
        None if pool is None else _pool_shape(*pool),
        tuple(block.shape for block in blocks),
        head.out_features,
        stem.norm.eps,
        type(model).__name__,
    )
    plain = PlainResNet(architecture).eval()
    _copy_weights(plain, stem, blocks, head)
    if image_size is None:
        shrinks = pool is not None or stem.shape.stride > 1
        image_size = (64, 64) if shrinks else (32, 32)
    _compare(model, plain, image_size)
    return plain


class _Reader:
    """The modules of a network in the order of their definition, containers opened."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(_flatten("", model))
        self._next = 0

    def _peek(self) -> tuple[str, nn.Module] | None:
        while self._next < len(self._modules):
            name, module = self._modules[self._next]
            if not isinstance(module, _NO_OPS):
                return name, module
            self._next += 1
        return None

    def take(self, what: str, kind: type[nn.Module] = nn.Module) -> tuple[str, nn.Module]:
        """The next module, which must be of a kind."""
        found = self._peek()
        if found is None or not isinstance(found[1], kind):
            raise self.unexpected(what)
        self._next += 1
        return found

    def unexpected(self, what: str) -> ValueError:
        """The error of finding the next module where something else is needed."""
        found = self._peek()
        if found is None:
            return ValueError(f"model: it ends where {what} is expected")
        return _unsupported(*found, f"expected {what}")

    def skip(self, kind: type[nn.Module]) -> tuple[str, nn.Module] | None:
        """The next module if it is of a kind."""
        found = self._peek()
        return self.take("", kind) if found is not None and isinstance(found[1], kind) else None

    def is_block(self) -> bool:
        found = self._peek()
        return found is not None and _is_block(found[1])

    def skip_pooling(self) -> None:
        """Global pooling and flattening, if they are modules; the comparison tells if they fit."""
        while (found := self._peek()) is not None and not isinstance(found[1], nn.Linear):
            leaves = [m for m in found[1].modules() if next(m.children(), None) is None]
            if not all(isinstance(m, _POOLING) for m in leaves):
                raise self.unexpected("global average pooling or a linear layer")
            self._next += 1

    def finish(self) -> None:
        if self._peek() is not None:
            raise self.unexpected("nothing behind the linear layer")


def _flatten(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Sequential):
            yield from _flatten(f"{path}.", child)
        else:
            yield path, child


def _is_block(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("conv1", "bn1", "conv2", "bn2"))


def _read_block(name: str, block: nn.Module) -> _Block:
    layers: list[_Layer] = []
    known: set[str] = set()
    shortcut: _Layer | None = None
    number = 1
    while hasattr(block, f"conv{number}"):
        names = (f"conv{number}", f"bn{number}")
        conv, norm = (getattr(block, part, None) for part in names)
        layers.append(_layer(f"{name}.{names[0]}", conv, f"{name}.{names[1]}", norm))
        known.update(names)
        number += 1
    for part, module in block.named_children():
        path = f"{name}.{part}"
        if part in known or isinstance(module, _NO_OPS):
            continue
        if part in _SHORTCUTS:
            shortcut = _read_shortcut(path, module)
        elif not isinstance(module, nn.ReLU):
            raise _unsupported(path, module, "a residual block of convolutions, BatchNorm and ReLU")
    return _Block(tuple(layers), shortcut)


def _read_shortcut(name: str, module: nn.Module) -> _Layer | None:
    parts = [(f"{name}.{n}", m) for n, m in module.named_children() if not isinstance(m, _NO_OPS)]
    if not parts and isinstance(module, (nn.Sequential, nn.Identity)):
        return None
    if len(parts) != 2:
        path, odd = next(
            ((p, m) for p, m in parts if not isinstance(m, (nn.Conv2d, nn.BatchNorm2d))),
            (name, module),
        )
        raise _unsupported(path, odd, "expected a convolution and its BatchNorm")
    return _layer(*parts[0], *parts[1])


def _layer(conv_name: str, conv: Any, norm_name: str, norm: Any) -> _Layer:
    if type(conv) is not nn.Conv2d:
        raise _unsupported(conv_name, conv, "expected an nn.Conv2d")
    if type(norm) is not nn.BatchNorm2d:
        raise _unsupported(norm_name, norm, "expected an nn.BatchNorm2d")
    if conv.bias is not None or conv.padding_mode != "zeros":
        raise _unsupported(conv_name, conv, "without a bias and padded with zeros")
    padding = conv._reversed_padding_repeated_twice
    if any(len(set(pair)) > 1 for pair in (conv.kernel_size, conv.stride, conv.dilation, padding)):
        raise _unsupported(conv_name, conv, "the same in both directions")
    if norm.running_mean is None or not norm.affine:
        raise _unsupported(norm_name, norm, "with running statistics and an affine map")
    return _Layer(norm_name, conv, norm)


def _pool_shape(name: str, pool: nn.Module) -> PoolShape:
    assert isinstance(pool, nn.MaxPool2d)
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if not all(isinstance(size, int) for size in sizes) or pool.dilation != 1 or pool.ceil_mode:
        raise _unsupported(name, pool, "square, without dilation and ceil_mode")
    return PoolShape(pool.kernel_size, pool.stride, pool.padding)  # type: ignore[arg-type]


def _unsupported(name: str, module: Any, wanted: str) -> ValueError:
    return ValueError(f"model: {name} ({type(module).__name__}) is not supported; {wanted}")


@torch.no_grad()
def _copy_weights(
    plain: PlainResNet, stem: _Layer, blocks: Sequence[_Block], head: nn.Linear
) -> None:
    pairs: list[tuple[str, str, _Layer]] = [("stem", "bn_stem", stem)]
    for i, block in enumerate(blocks):
        pairs += [
            (f"blocks.{i}.conv{k}", f"blocks.{i}.bn{k}", layer)
            for k, layer in enumerate(block.layers, 1)
        ]
        if block.shortcut is not None:
            pairs.append((f"blocks.{i}.shortcut", f"blocks.{i}.bn_shortcut", block.shortcut))
    for conv, norm, layer in pairs:
        plain.get_submodule(conv).load_state_dict(layer.conv.state_dict())
        plain.get_submodule(norm).load_state_dict(layer.norm.state_dict())
    plain.classifier.weight.copy_(head.weight[:, :, None, None])
    plain.classifier.bias.zero_()  # type: ignore[union-attr]
    if head.bias is not None:
        plain.classifier.bias.copy_(head.bias)  # type: ignore[union-attr]


@torch.no_grad()
def _compare(model: nn.Module, plain: PlainResNet, image_size: tuple[int, int]) -> None:
    """Refuse a network whose forward does something else than its modules say."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, plain.architecture.in_channels, *image_size, generator=generator)
    # A copy on the CPU: no mode of the original changes, and nothing rounds to TF32.
    expected: Tensor = copy.deepcopy(model).cpu().eval()(images)
    got = plain(images)
    if expected.shape != got.shape or not torch.isfinite(expected).all():
        raise ValueError(
            f"model must give finite logits {tuple(got.shape)}, got {tuple(expected.shape)}"
        )
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if difference > _TOLERANCE:
        raise ValueError(
            f"model: its forward does something else than its modules say; built from them, the "
            f"logits differ by {difference:.2g} of the largest"
        )
