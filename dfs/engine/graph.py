"""What a frozen network consists of: an explicit description, and tensors that it names.

The description is plain data and travels as JSON. From it follows which tensors there must be, of
which types and shapes, so that a file is either whole or refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dfs.models.architecture import Architecture
from dfs.nn.shapes import BlockShape, ConvShape, PoolShape, Size
from dfs_kernels.packing import WeightLayout, check_scales
from dfs_kernels.widths import KERNEL_WIDTHS, LEVEL_KINDS, check_accumulator, check_options

FORMAT = "dfs-engine"
VERSION = 1
STREAMS = ("uint8", "float32")
GATES = ("rnn", "feedforward", "constant")
# Far beyond any network, and small enough that sizes computed from them stay ordinary numbers.
_MOST_CHANNELS, _MOST_BLOCKS, _MOST_PIXELS, _MOST_KERNEL = 1 << 14, 1 << 12, 1 << 24, 64
# 64 channels of 1024 x 1024; and 500 times a ResNet-101 on an image of 224 x 224.
_MOST_VALUES, _MOST_MACS = 1 << 26, 1 << 42

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LayerNode:
    """A convolution with its folded BatchNorm.

    Attributes:
        name: what its tensors begin with.
        widths: ascending, those it can run at.
        has_bias: whether the convolution itself adds one.
    """

    name: str
    shape: ConvShape
    widths: tuple[int, ...]
    levels: tuple[str, ...]
    has_bias: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C/groups, KH, KW)."""
        s = self.shape
        return s.out_channels, s.in_channels // s.groups, s.kernel, s.kernel

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.weight_shape, self.widths)

    def tensors(self) -> dict[str, Spec]:
        """Its tensors by their whole names."""
        count, outputs = len(self.widths), self.shape.out_channels
        parts: dict[str, Spec] = {
            "codes": (torch.uint8, (self.layout.offsets()[-1],)),
            "weight_scale": (torch.float32, (count, outputs)),
            "input_scale": (torch.float32, (count,)),
            "input_zero_point": (torch.int32, (count,)),
            "mul": (torch.float32, (count, outputs)),
            "add": (torch.float32, (count, outputs)),
        }
        if self.has_bias:
            parts["bias"] = (torch.float32, (outputs,))
        return {f"{self.name}.{part}": spec for part, spec in parts.items()}


@dataclass(frozen=True)
class GateNode:
    """The gate of a gated block.

    Attributes:
        kind: one of :data:`GATES`.
        hidden: units; 0 for a constant gate.
        deviation: whether it sees every channel's deviation beside its mean.
    """

    kind: str
    hidden: int
    deviation: bool

    def tensors(self, index: int, channels: int, choices: int) -> dict[str, Spec]:
        """Those of gate ``index``, which sees so many channels."""
        seen = channels * (2 if self.deviation else 1)
        embed = {"embed_weight": (self.hidden, seen), "embed_bias": (self.hidden,)}
        proj = {"proj_weight": (choices, self.hidden), "proj_bias": (choices,)}
        shapes: dict[str, tuple[int, ...]]
        if self.kind == "rnn":
            shapes = {**embed}
        elif self.kind == "feedforward":
            shapes = {**embed, **proj}
        else:
            shapes = {"logits": (choices,)}
        return {f"gates.{index}.{k}": (torch.float32, shape) for k, shape in shapes.items()}

    def shared_tensors(self, choices: int) -> dict[str, Spec]:
        specs: dict[str, Spec] = {"gate.choice_bias": (torch.float64, (choices,))}
        if self.kind == "rnn":
            hidden = self.hidden
            for name, shape in (
                ("weight_ih", (4 * hidden, hidden)),
                ("weight_hh", (4 * hidden, hidden)),
                ("bias_ih", (4 * hidden,)),
                ("bias_hh", (4 * hidden,)),
                ("proj_weight", (choices, hidden)),
                ("proj_bias", (choices,)),
            ):
                specs[f"gate.{name}"] = (torch.float32, shape)
        return specs


@dataclass(frozen=True)
class EngineGraph:
    """A frozen network.

    Attributes:
        image_size: (H, W).
        choices: ascending widths of the gated blocks.
        ungated_bits: width of the stem, the first block, shortcuts and the classifier.
        stream: one of :data:`STREAMS`.
        levels: by width, how weight codes are read.
    """

    architecture: Architecture
    image_size: Size
    choices: tuple[int, ...]
    ungated_bits: int
    stream: str
    gate: GateNode
    levels: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise ValueError(f"stream must be one of {STREAMS}, got {self.stream!r}")
        if self.gate.kind not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.gate.kind!r}")
        options = tuple(c for c in self.choices if c != 0)
        check_options(options, "choices")
        if list(self.choices) != sorted(set(self.choices)):
            raise ValueError(f"choices must be ascending, got {self.choices}")
        for bits in (*options, self.ungated_bits):
            if bits not in KERNEL_WIDTHS:
                raise ValueError(f"widths must be 0 or one of {KERNEL_WIDTHS}, got {bits}")
        widths = {*options, self.ungated_bits}
        if {bits for bits, _ in self.levels} != widths:
            raise ValueError(f"levels must be of the widths {sorted(widths)}, got {self.levels}")
        for layer in self.layers():
            s = layer.shape
            taps = s.in_channels // s.groups * s.kernel**2
            check_accumulator(taps, layer.widths, [kind == "centred" for kind in layer.levels])
        self._check_sizes()

    def _check_sizes(self) -> None:
        shape = self.architecture
        maps = [(shape.in_channels, self.image_size)]
        maps.append((shape.stem.out_channels, shape.pooled_size(self.image_size)))
        maps += [(layer.shape.out_channels, size) for layer, size in self._outputs()]
        for channels, (height, width) in maps:
            if height < 1 or width < 1:
                raise ValueError(f"image_size {self.image_size} is too small for the network")
            if channels * height * width > _MOST_VALUES:
                raise ValueError(
                    f"image_size {self.image_size} makes a map of {channels} x {height} x {width} "
                    f"values, at most {_MOST_VALUES} are allowed"
                )
        if self.macs() > _MOST_MACS:
            raise ValueError(f"an image would take {self.macs()} products, at most {_MOST_MACS}")

    def _outputs(self) -> Iterator[tuple[LayerNode, Size]]:
        """Every layer with the (H, W) of what it writes."""
        shape = self.architecture
        yield self.stem, shape.stem.output_size(self.image_size)
        for index, (_, size) in enumerate(shape.block_sizes(self.image_size)):
            branch, shortcut = self.block_layers(index)
            if shortcut is not None:
                yield shortcut, shortcut.shape.output_size(size)
            for layer in branch:
                size = layer.shape.output_size(size)
                yield layer, size
        yield self.classifier, (1, 1)

    def macs(self) -> int:
        """Multiply-accumulates of one image with nothing skipped, gates left out."""
        return sum(
            math.prod(layer.weight_shape) * size[0] * size[1] for layer, size in self._outputs()
        )

    @property
    def gated_blocks(self) -> int:
        return len(self.architecture.blocks) - 1

    @property
    def options(self) -> tuple[int, ...]:
        """The non-zero choices."""
        return tuple(c for c in self.choices if c != 0)

    def block_layers(self, index: int) -> tuple[list[LayerNode], LayerNode | None]:
        """The branch of a block, and its shortcut."""
        block = self.architecture.blocks[index]
        widths = self.options if index else (self.ungated_bits,)
        prefix = f"blocks.{index}"
        branch = [
            self._layer(f"{prefix}.conv{i}", conv, widths) for i, conv in enumerate(block.convs, 1)
        ]
        if block.shortcut is None:
            return branch, None
        return branch, self._layer(f"{prefix}.shortcut", block.shortcut, (self.ungated_bits,))

    @property
    def stem(self) -> LayerNode:
        return self._layer("stem", self.architecture.stem, (self.ungated_bits,))

    @property
    def classifier(self) -> LayerNode:
        shape = ConvShape(self.architecture.out_channels, self.architecture.num_classes, 1)
        return self._layer("classifier", shape, (self.ungated_bits,), has_bias=True)

    def _layer(
        self, name: str, shape: ConvShape, widths: tuple[int, ...], has_bias: bool = False
    ) -> LayerNode:
        levels = dict(self.levels)
        return LayerNode(name, shape, widths, tuple(levels[b] for b in widths), has_bias)

    def layers(self) -> Iterator[LayerNode]:
        yield self.stem
        for index in range(len(self.architecture.blocks)):
            branch, shortcut = self.block_layers(index)
            yield from branch
            if shortcut is not None:
                yield shortcut
        yield self.classifier

    def tensors(self) -> dict[str, Spec]:
        """Every tensor that there must be, and no other: its dtype and shape."""
        specs: dict[str, Spec] = {}
        for layer in self.layers():
            specs.update(layer.tensors())
        for i in range(self.architecture.streams[-1] + 1):
            specs[f"streams.{i}.scale"] = (torch.float32, (1,))
        count = len(self.choices)
        for i, block in enumerate(self.architecture.blocks[1:]):
            specs.update(self.gate.tensors(i, block.in_channels, count))
        specs.update(self.gate.shared_tensors(count))
        return specs

    def check_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors that do not fit: missing, unknown, of another form, out of range.

        Raises:
            ValueError: naming the tensor.
        """
        expected = self.tensors()
        for name in expected.keys() - tensors.keys():
            raise ValueError(f"tensor {name} is missing")
        for name in tensors.keys() - expected.keys():
            raise ValueError(f"tensor {name} belongs to nothing")
        for name, (dtype, shape) in expected.items():
            value = tensors[name]
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise ValueError(
                    f"tensor {name} must be {dtype} {shape}, got {value.dtype} {tuple(value.shape)}"
                )
            if dtype.is_floating_point and not bool(torch.isfinite(value).all()):
                raise ValueError(f"tensor {name} holds values that are not finite")
        for layer in self.layers():
            self._check_layer(layer, tensors)
        for i in range(self.architecture.streams[-1] + 1):
            check_scales(tensors[f"streams.{i}.scale"], (8,), f"streams.{i}.scale")

    def _check_layer(self, layer: LayerNode, tensors: dict[str, Tensor]) -> None:
        name = layer.name
        check_scales(tensors[f"{name}.weight_scale"], layer.widths, f"{name}.weight_scale")
        check_scales(tensors[f"{name}.input_scale"], layer.widths, f"{name}.input_scale")
        zeros = tensors[f"{name}.input_zero_point"].tolist()
        for bits, zero in zip(layer.widths, zeros, strict=True):
            if bits != 32 and not 0 <= zero < 1 << bits:
                raise ValueError(f"tensor {name}.input_zero_point is {zero} at {bits} bits")
        if 32 in layer.widths:
            weights = layer.layout.segment(tensors[f"{name}.codes"], 32)
            if not bool(torch.isfinite(weights.contiguous().view(torch.float32)).all()):
                raise ValueError(f"tensor {name}.codes holds weights that are not finite")

    def to_json(self) -> dict[str, Any]:
        """Plain data, for :meth:`from_json`."""
        shape = self.architecture
        return {
            "format": FORMAT,
            "version": VERSION,
            "image_size": list(self.image_size),
            "choices": list(self.choices),
            "ungated_bits": self.ungated_bits,
            "stream": self.stream,
            "gate": asdict(self.gate),
            "levels": {str(bits): kind for bits, kind in self.levels},
            "architecture": {
                "name": shape.name,
                "num_classes": shape.num_classes,
                "stem": asdict(shape.stem),
                "pool": None if shape.pool is None else asdict(shape.pool),
                "blocks": [
                    {
                        "convs": [asdict(conv) for conv in block.convs],
                        "shortcut": None if block.shortcut is None else asdict(block.shortcut),
                    }
                    for block in shape.blocks
                ],
            },
        }

    @staticmethod
    def from_json(data: Any) -> EngineGraph:
        """Undo :meth:`to_json`.

        Raises:
            ValueError: it is not such a description, of this version; says what is wrong.
        """
        top = _record(data, "graph")
        if top.get("format") != FORMAT:
            raise ValueError(f"its format is {top.get('format')!r}, not {FORMAT!r}")
        if top.get("version") != VERSION:
            raise ValueError(
                f"it is of version {top.get('version')!r}; this library reads version {VERSION}"
            )
        _only(top, {"format", "version", "image_size", "choices", "ungated_bits", "stream", "gate",
                    "levels", "architecture"}, "graph")  # fmt: skip
        shape = _record(top["architecture"], "architecture")
        _only(shape, {"name", "num_classes", "stem", "pool", "blocks"}, "architecture")
        blocks = _items(shape["blocks"], "blocks", _MOST_BLOCKS)
        architecture = Architecture(
            _conv(shape["stem"], "stem"),
            None if shape["pool"] is None else _pool(shape["pool"]),
            tuple(_block(block, f"blocks[{i}]") for i, block in enumerate(blocks)),
            _integer(shape["num_classes"], "num_classes", 1, _MOST_CHANNELS),
            name=_text(shape["name"], "name"),
        )
        size = _items(top["image_size"], "image_size", 2)
        if len(size) != 2:
            raise ValueError(f"image_size must be a pair, got {size}")
        height, width = (_integer(n, "image_size", 1, _MOST_PIXELS) for n in size)
        if height * width > _MOST_PIXELS:
            raise ValueError(f"image_size {size} has too many pixels")
        gate = _record(top["gate"], "gate")
        _only(gate, {"kind", "hidden", "deviation"}, "gate")
        if not isinstance(gate["deviation"], bool):
            raise ValueError("gate.deviation must be true or false")
        levels = _record(top["levels"], "levels")
        choices = _items(top["choices"], "choices", 33)
        return EngineGraph(
            architecture,
            (height, width),
            tuple(_integer(c, "choices", 0, 32) for c in choices),
            _integer(top["ungated_bits"], "ungated_bits", 2, 32),
            _text(top["stream"], "stream"),
            GateNode(
                _text(gate["kind"], "gate.kind"),
                _integer(gate["hidden"], "gate.hidden", 0, _MOST_CHANNELS),
                gate["deviation"],
            ),
            tuple(sorted(_level(bits, kind) for bits, kind in levels.items())),
        )


def _record(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object, got {type(data).__name__}")
    return data


def _only(record: dict[str, Any], keys: set[str], name: str) -> None:
    if set(record) != keys:
        odd = sorted(set(record) ^ keys)
        raise ValueError(f"{name} must have exactly {sorted(keys)}; {odd} differ")


def _items(data: Any, name: str, most: int) -> list[Any]:
    if not isinstance(data, list) or len(data) > most:
        raise ValueError(f"{name} must be a list of at most {most}")
    return data


def _integer(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def _level(bits: str, kind: Any) -> tuple[int, str]:
    if bits not in {str(b) for b in KERNEL_WIDTHS} or kind not in LEVEL_KINDS:
        raise ValueError(f"levels: {bits}: {kind} is not a width and one of {LEVEL_KINDS}")
    return int(bits), kind


def _conv(data: Any, name: str) -> ConvShape:
    record = _record(data, name)
    limits = {
        "in_channels": (1, _MOST_CHANNELS),
        "out_channels": (1, _MOST_CHANNELS),
        "kernel": (1, _MOST_KERNEL),
        "stride": (1, _MOST_KERNEL),
        "padding": (0, _MOST_KERNEL),
        "dilation": (1, _MOST_KERNEL),
        "groups": (1, _MOST_CHANNELS),
    }
    _only(record, set(limits), name)
    values = {k: _integer(record[k], f"{name}.{k}", *limits[k]) for k in limits}
    if values["in_channels"] % values["groups"] or values["out_channels"] % values["groups"]:
        raise ValueError(f"{name}.groups must divide its channels, got {values['groups']}")
    return ConvShape(**values)


def _pool(data: Any) -> PoolShape:
    record = _record(data, "pool")
    _only(record, {"kernel", "stride", "padding"}, "pool")
    pool = PoolShape(
        _integer(record["kernel"], "pool.kernel", 1, _MOST_KERNEL),
        _integer(record["stride"], "pool.stride", 1, _MOST_KERNEL),
        _integer(record["padding"], "pool.padding", 0, _MOST_KERNEL),
    )
    if 2 * pool.padding > pool.kernel:
        raise ValueError("pool.padding must be at most half of pool.kernel")
    return pool


def _block(data: Any, name: str) -> BlockShape:
    record = _record(data, name)
    _only(record, {"convs", "shortcut"}, name)
    convs = _items(record["convs"], f"{name}.convs", 16)
    shortcut = record["shortcut"]
    return BlockShape(
        tuple(_conv(conv, f"{name}.convs[{i}]") for i, conv in enumerate(convs)),
        None if shortcut is None else _conv(shortcut, f"{name}.shortcut"),
    )
