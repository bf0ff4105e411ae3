"""The packed formats: activations as rows of unsigned codes, weights as one checked buffer.

Canonical activations: per sample, H*W pixels of ceil(C*b/8) bytes, channels innermost across all
groups; float32 NHWC at 32 bits. Canonical weights: [O][KH][KW][ceil(C_g*b/8)] bytes of two's
complement codes. In both, the lowest bits of a byte hold the lowest channel and tail codes are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.widths import (
    DEFAULT_OPTIONS,
    KERNEL_WIDTHS,
    LEVEL_KINDS,
    MAX_SCALE,
    MIN_SCALE,
    check_options,
    default_levels,
)

WEIGHT_FORMAT_VERSION = 1
_SEGMENT_ALIGNMENT = 64


def packed_bytes(channels: int, bits: int) -> int:
    """Bytes that ``channels`` codes of ``bits`` bits take."""
    return (channels * bits + 7) // 8


def new_packed_codes(codes: Tensor, bits: int) -> Tensor:
    """What packing ``codes`` (..., C) gives, to be written: uint8 (..., ceil(C*bits/8))."""
    size = packed_bytes(codes.shape[-1], bits)
    return codes.new_empty((*codes.shape[:-1], size), dtype=torch.uint8)


def new_codes(packed: Tensor, channels: int, signed: bool) -> Tensor:
    """What unpacking gives, to be written: (..., channels), int8 if ``signed``, else uint8."""
    dtype = torch.int8 if signed else torch.uint8
    return packed.new_empty((*packed.shape[:-1], channels), dtype=dtype)


def row_bytes(options: Sequence[int], channels: int, height: int, width: int) -> int:
    """Bytes of one sample's row: that of the widest option."""
    return height * width * packed_bytes(channels, options[-1])


def check_packable(options: Sequence[int], name: str) -> tuple[int, ...]:
    """``options`` checked to be widths that have a packed form."""
    values = check_options(options, name)
    for value in values:
        if value not in KERNEL_WIDTHS:
            raise ValueError(f"{name}: only {KERNEL_WIDTHS} bits can be packed, got {value}")
    return values


def check_scales(scale: Tensor, options: Sequence[int], name: str) -> None:
    """Refuse scales that are not in [2^-126, 2^126]; rows for 32 bits are ignored.

    Reads the values, so it must not be called on a GPU outside of ``DFS_DEBUG``.
    """
    used = [i for i, b in enumerate(options) if b != 32]
    values = scale.detach()[used]
    good = (values >= MIN_SCALE) & (values <= MAX_SCALE)
    if not bool(good.all()):
        bad = values[~good].flatten()[0].item()
        raise ValueError(f"{name} must lie in [2^-126, 2^126], got {bad}")


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Per-tensor activation quantizer: x is about (q - zero_point) * scale at each width.

    Attributes:
        options: the widths, ascending; the tensors are indexed like it.
        scale: float32 (len(options),).
        zero_point: int32 (len(options),), each in [0, 2^b - 1].
    """

    options: tuple[int, ...]
    scale: Tensor
    zero_point: Tensor

    def at(self, bits: int) -> tuple[Tensor, Tensor]:
        """The scale and zero point of one width, as 0-dimensional tensors."""
        index = self.options.index(bits)
        return self.scale[index], self.zero_point[index]

    def check_values(self, name: str) -> None:
        """Refuse scales and zero points out of range. Reads the values.

        Args:
            name: what the arguments' names start with, or "".
        """
        prefix = f"{name}_" if name else ""
        check_scales(self.scale, self.options, f"{prefix}scale")
        for bits, z in zip(self.options, self.zero_point.tolist(), strict=True):
            if bits != 32 and not 0 <= z < 1 << bits:
                raise ValueError(
                    f"{prefix}zero_point must lie in [0, {(1 << bits) - 1}] at {bits} bits, got {z}"
                )

    def to(self, device: torch.device | str) -> Quantizer:
        return Quantizer(self.options, self.scale.to(device), self.zero_point.to(device))


@dataclass(frozen=True, eq=False)
class PackedActivation:
    """A batch of activations, each sample packed at its own width.

    Attributes:
        data: uint8 (N, row_bytes), rows sized by the widest option. A row of a sample stored at
            0 bits is unspecified and never read.
        bits: int32 (N,), the width each sample is stored at: 0 or one of ``bit_options``.
        scale: float32 (len(bit_options),).
        zero_point: int32 (len(bit_options),).
        bit_options: the widths, ascending, out of 2, 4, 8 and 32.
        channels, height, width: C, H, W.
    """

    data: Tensor
    bits: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_options: tuple[int, ...]
    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_packable(self.bit_options, "bit_options")
        if self.data.dtype != torch.uint8 or self.data.dim() != 2:
            raise TypeError(
                f"data must be uint8 (N, row_bytes), got {self.data.dtype} "
                f"with {self.data.dim()} dimensions"
            )
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        expected = row_bytes(self.bit_options, self.channels, self.height, self.width)
        if self.data.shape[1] != expected:
            raise ValueError(
                f"data has rows of {self.data.shape[1]} bytes, but {self.channels}x{self.height}x"
                f"{self.width} at {self.bit_options[-1]} bits takes {expected}"
            )
        if not self.data.is_contiguous():
            raise ValueError("data must be contiguous")
        for name, dtype, size in (
            ("bits", torch.int32, self.data.shape[0]),
            ("scale", torch.float32, len(self.bit_options)),
            ("zero_point", torch.int32, len(self.bit_options)),
        ):
            value = getattr(self, name)
            if value.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
            if value.dim() != 1 or value.shape[0] != size:
                raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
            if value.device != self.data.device:
                raise ValueError(f"{name} is on {value.device}, but data is on {self.data.device}")
            if not value.is_contiguous():
                # The kernels read these where they lie. (The way to set a frozen field.)
                object.__setattr__(self, name, value.contiguous())

    @staticmethod
    def unchecked(
        data: Tensor,
        bits: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_options: tuple[int, ...],
        channels: int,
        height: int,
        width: int,
    ) -> PackedActivation:
        """The constructor for what is known to pass its checks, at a tenth of the time."""
        made = object.__new__(PackedActivation)
        made.__dict__.update(
            data=data,
            bits=bits,
            scale=scale,
            zero_point=zero_point,
            bit_options=bit_options,
            channels=channels,
            height=height,
            width=width,
        )
        return made

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer(self.bit_options, self.scale, self.zero_point)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.data.shape[0], self.channels, self.height, self.width

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> PackedActivation:
        return replace(
            self,
            data=self.data.to(device),
            bits=self.bits.to(device),
            scale=self.scale.to(device),
            zero_point=self.zero_point.to(device),
        )

    def clone(self) -> PackedActivation:
        return replace(self, data=self.data.clone())


def new_rows(like: Tensor, shape: Sequence[int], options: Sequence[int]) -> Tensor:
    """Rows of packed activations (N, C, H, W) to be written, where ``like`` is."""
    size = row_bytes(options, shape[1], shape[2], shape[3])
    return like.new_empty((shape[0], size), dtype=torch.uint8)


def new_packed(
    like: Tensor,
    shape: Sequence[int],
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    options: tuple[int, ...],
) -> PackedActivation:
    """The same with all that says how they are to be read."""
    data = new_rows(like, shape, options)
    return PackedActivation(data, bits, scale, zero_point, options, *shape[1:])


@dataclass(frozen=True)
class WeightLayout:
    """Where each width's codes lie in the one buffer of a packed weight.

    Attributes:
        shape: (O, C/groups, KH, KW).
        options: the non-zero widths held, ascending.
    """

    shape: tuple[int, int, int, int]
    options: tuple[int, ...]

    def segment_shape(self, bits: int) -> tuple[int, int, int, int]:
        """(O, KH, KW, bytes) of one width's codes."""
        out_channels, group_channels, kernel_h, kernel_w = self.shape
        return out_channels, kernel_h, kernel_w, packed_bytes(group_channels, bits)

    def offsets(self) -> tuple[int, ...]:
        """The byte at which each width starts, and the buffer's size as the last entry."""
        result = [0]
        for bits in self.options:
            o, kh, kw, size = self.segment_shape(bits)
            end = result[-1] + o * kh * kw * size
            result.append(-(-end // _SEGMENT_ALIGNMENT) * _SEGMENT_ALIGNMENT)
        return tuple(result)

    def segment(self, buffer: Tensor, bits: int) -> Tensor:
        """The view of ``buffer`` that holds one width: uint8 (O, KH, KW, bytes)."""
        shape = self.segment_shape(bits)
        start = self.offsets()[self.options.index(bits)]
        size = shape[0] * shape[1] * shape[2] * shape[3]
        return buffer[start : start + size].view(shape)


@dataclass(eq=False)
class DerivedWeights:
    """What is made from a packed weight on first use, and made again after an edit.

    Attributes:
        edits: the version of the buffer that all of it was made from.
        tiles: re-tiled copies by backend, variant and groups.
        plans, last_plan: what dfs_kernels.direct keeps from call to call.
    """

    edits: int
    tiles: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    last_plan: Any = None


def _edits(tensor: Tensor | None) -> int:
    """How often a tensor was edited in place; tensors of inference mode don't count that."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@dataclass(eq=False)
class PackedConvWeight:
    """The weight of one convolution, bit-packed at several widths.

    Attributes:
        buffer: uint8, every width's codes in the canonical layout.
        scales: float32 (len(bit_options), O), the steps; rows for 32 bits are ignored.
        bit_options: the ascending non-zero widths it holds.
        levels: per width, "twos" (level = q) or "centred" (level = 2q + 1 with half the step).
        shape: (O, C/groups, KH, KW).
    """

    buffer: Tensor
    scales: Tensor
    bit_options: tuple[int, ...]
    levels: tuple[str, ...]
    shape: tuple[int, int, int, int]
    _derived: DerivedWeights = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_packable(self.bit_options, "bit_options")
        for kind in self.levels:
            if kind not in LEVEL_KINDS:
                raise ValueError(f"levels must be one of {LEVEL_KINDS}, got {kind!r}")
        count = len(self.bit_options)
        if len(self.levels) != count:
            raise ValueError(f"levels must name {count} kinds, got {self.levels}")
        size = self.layout.offsets()[-1]
        for name, dtype, shape in (
            ("buffer", torch.uint8, (size,)),
            ("scales", torch.float32, (count, self.shape[0])),
        ):
            value = getattr(self, name)
            if value.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            if not value.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        if self.scales.device != self.buffer.device:
            raise ValueError(
                f"scales is on {self.scales.device}, but buffer is on {self.buffer.device}"
            )

    @staticmethod
    def from_float(
        weight: Tensor,
        scales: Tensor | Mapping[int, Tensor],
        bit_options: Sequence[int] = DEFAULT_OPTIONS,
        levels: Mapping[int, str] | None = None,
    ) -> PackedConvWeight:
        """Quantize and pack a float weight.

        Args:
            weight: floating (O, C/groups, KH, KW), finite.
            scales: the step of each width and output channel: (len(bit_options), O), or a dict
                keyed by width of (O,) tensors; the entry for 32 is ignored and may be missing.
            bit_options: ascending widths out of 2, 4, 8 and 32.
            levels: the level kind of some widths; by default "centred" at 2 bits, "twos" above.

        Raises:
            TypeError, ValueError: naming the argument, also for non-finite weights and for
                scales outside [2^-126, 2^126].
        """
        from dfs_kernels import backends, reference

        options = check_packable(bit_options, "bit_options")
        check_float_weight(weight)
        kinds = resolve_levels(options, levels)
        source = weight.detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(source).all()):
            raise ValueError("weight holds values that are not finite")
        shape = (source.shape[0], source.shape[1], source.shape[2], source.shape[3])
        steps = per_width(
            scales, options, "scales", torch.float32, source.device, (shape[0],), fill=1.0
        ).detach()
        check_scales(steps, options, "scales")
        layout = WeightLayout(shape, options)
        buffer = torch.zeros(layout.offsets()[-1], dtype=torch.uint8, device=source.device)
        backend = backends.select("quantize_weight", None, source.device, options)
        for i, (bits, kind) in enumerate(zip(options, kinds, strict=True)):
            target = layout.segment(buffer, bits)
            if bits == 32:
                target.copy_(reference.float_bytes(source.permute(0, 2, 3, 1)))
            else:
                backend.quantize_weight(source, steps[i], bits, kind == "centred", out=target)
        return PackedConvWeight(buffer, steps.clone(), options, kinds, shape)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if not name.startswith("_"):
            # What there was came from what the attribute used to be. A new object rather than the
            # old one emptied: a thread that is deriving something now adds it to the old one.
            self._derived = DerivedWeights(_edits(self.__dict__.get("buffer")))

    def __getstate__(self) -> dict[str, Any]:
        # Re-tiled copies are never saved, and plans hold addresses, which mean nothing in a copy.
        return {**self.__dict__, "_derived": DerivedWeights(_edits(self.buffer))}

    @property
    def derived(self) -> DerivedWeights:
        """What was made from the codes, unless they were edited since."""
        derived = self._derived
        if torch.compiler.is_compiling():
            return derived
        edits = _edits(self.buffer)
        if derived.edits != edits:
            derived = self._derived = DerivedWeights(edits)
        return derived

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.shape, self.bit_options)

    @property
    def centred(self) -> tuple[bool, ...]:
        return tuple(kind == "centred" for kind in self.levels)

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and scales, without any re-tiled copy."""
        return self.buffer.numel() + self.scales.numel() * self.scales.element_size()

    def packed(self, bits: int) -> Tensor:
        """The codes of one width, canonical: a uint8 (O, KH, KW, bytes) view."""
        self._check_holds(bits)
        return self.layout.segment(self.buffer, bits)

    def dequantize(self, bits: int) -> Tensor:
        """The float32 (O, C/groups, KH, KW) values that a width stands for."""
        from dfs_kernels import reference

        self._check_holds(bits)
        codes = self.packed(bits)
        if bits == 32:
            return codes.view(torch.float32).permute(0, 3, 1, 2).contiguous()
        index = self.bit_options.index(bits)
        levels = reference.unpack_weight_levels(codes, bits, self.shape[1], self.centred[index])
        return reference.dequantize_weight(
            levels.double(), self.scales[index], self.centred[index]
        ).float()

    def tiles(self, backend: str, geometry: ConvGeometry) -> Tensor | None:
        """A backend's private re-tiled copy for one use, made once and kept, never saved."""
        from dfs_kernels import backends

        module = backends.load(backend)
        variant = module.tile_variant()
        if variant is None:
            return None
        key = (backend, variant, geometry.groups)
        known = self.derived.tiles
        if key not in known:
            known[key] = torch.ops.dfs.retile_weight(
                self.buffer,
                self.scales,
                bit_options=self.bit_options,
                centred=self.centred,
                backend=backend,
                variant=variant,
                **geometry.fields(),
            )
        return known[key]

    def to(self, device: torch.device | str) -> PackedConvWeight:
        if torch.device(device) == self.buffer.device:
            return self
        return PackedConvWeight(
            self.buffer.to(device),
            self.scales.to(device),
            self.bit_options,
            self.levels,
            self.shape,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The canonical codes with version, geometry and level kinds, as tensors only."""
        state = {
            "version": torch.tensor(WEIGHT_FORMAT_VERSION),
            "shape": torch.tensor(self.shape),
            "bit_options": torch.tensor(self.bit_options),
            "centred": torch.tensor(self.centred),
            "scales": self.scales.clone(),
        }
        for bits in self.bit_options:
            state[f"codes_{bits}"] = self.packed(bits).clone()
        return state

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> PackedConvWeight:
        """Rebuild a weight; refuses by name what does not fit.

        Raises:
            ValueError: an entry that is missing, or of another version, geometry, dtype or size.
        """
        for name in ("version", "shape", "bit_options", "centred", "scales"):
            if not isinstance(state.get(name), Tensor):
                raise ValueError(f"packed weight: entry {name!r} is missing")
        version = state["version"].flatten().tolist()
        if version != [WEIGHT_FORMAT_VERSION]:
            raise ValueError(
                f"packed weight: version is {version}, this build reads [{WEIGHT_FORMAT_VERSION}]"
            )
        dims = state["shape"].flatten().tolist()
        if len(dims) != 4 or any(not isinstance(d, int) or d < 1 for d in dims):
            raise ValueError(f"packed weight: shape must be four positive ints, got {dims}")
        shape = (dims[0], dims[1], dims[2], dims[3])
        options = check_packable(state["bit_options"].flatten().tolist(), "packed weight: options")
        centred = state["centred"].flatten().tolist()
        if len(centred) != len(options) or state["centred"].dtype != torch.bool:
            raise ValueError(f"packed weight: centred must hold {len(options)} bools")
        scales = state["scales"]
        if scales.dtype != torch.float32 or tuple(scales.shape) != (len(options), shape[0]):
            raise ValueError(
                f"packed weight: scales must be float32 ({len(options)}, {shape[0]}), "
                f"got {scales.dtype} {tuple(scales.shape)}"
            )
        check_scales(scales, options, "packed weight: scales")
        layout = WeightLayout(shape, options)
        buffer = torch.zeros(layout.offsets()[-1], dtype=torch.uint8, device=scales.device)
        for bits in options:
            codes = state.get(f"codes_{bits}")
            expected = layout.segment_shape(bits)
            if codes is None:
                raise ValueError(f"packed weight: entry 'codes_{bits}' is missing")
            if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
                raise ValueError(
                    f"packed weight: codes_{bits} must be uint8 {expected}, "
                    f"got {codes.dtype} {tuple(codes.shape)}"
                )
            layout.segment(buffer, bits).copy_(codes)
            if bits == 32:
                values = codes.contiguous().view(torch.float32)
                if not bool(torch.isfinite(values).all()):
                    raise ValueError("packed weight: codes_32 holds values that are not finite")
        kinds = tuple("centred" if c else "twos" for c in centred)
        return PackedConvWeight(buffer, scales.clone(), options, kinds, shape)

    def _check_holds(self, bits: int) -> None:
        if bits not in self.bit_options:
            raise ValueError(f"bits={bits} is not held; this weight has {self.bit_options}")


def check_float_weight(weight: Tensor) -> None:
    """Refuse what is no float (O, C/groups, KH, KW) tensor."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight must be (O, C/groups, KH, KW) with no empty side, got {tuple(weight.shape)}"
        )


def resolve_levels(
    options: Sequence[int], levels: Mapping[int, str] | None = None
) -> tuple[str, ...]:
    """The level kind of each option; 32 bits counts as "twos"."""
    given = dict(levels or {})
    for bits, kind in given.items():
        if bits not in options:
            raise ValueError(f"levels names {bits} bits, which is not among {tuple(options)}")
        if kind not in LEVEL_KINDS:
            raise ValueError(f"levels must be one of {LEVEL_KINDS}, got {kind!r} at {bits} bits")
    return tuple("twos" if b == 32 else given.get(b, default_levels(b)) for b in options)


def per_width(
    values: Tensor | Mapping[int, Tensor | float] | Sequence[float] | float,
    options: Sequence[int],
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] = (),
    fill: float | None = None,
) -> Tensor:
    """Bring per-width values to one tensor (len(options), *shape), keeping gradients.

    Args:
        values: a tensor indexed like ``options`` (or like ``options`` without 32), or a dict keyed
            by width. A plain number serves a single width other than 32.
        fill: what an entry for 32 that is missing becomes; None makes it an error.

    Raises:
        TypeError, ValueError: naming ``name``.
    """
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        number = float(values) if dtype.is_floating_point else values
        values = {b: number for b in options if b != 32}
        if len(values) > 1:
            raise ValueError(f"{name} must give a value for each of the widths {tuple(options)}")
    if isinstance(values, Mapping):
        rows = []
        for bits in options:
            if bits in values:
                value = values[bits]
                if not isinstance(value, Tensor):
                    value = torch.tensor(value, device=device)
                    if dtype.is_floating_point:
                        value = value.to(dtype)
                _check_entry(value, f"{name}[{bits}]", dtype, device)
                if value.dim() == 0 and shape:
                    value = value.expand(shape)
                elif value.dim() == 1 and not shape and value.shape[0] == 1:
                    value = value[0]
                if tuple(value.shape) != shape:
                    raise ValueError(
                        f"{name}[{bits}] must have shape {shape}, got {tuple(value.shape)}"
                    )
                rows.append(_cast(value, dtype))
            elif bits == 32 and fill is not None:
                rows.append(torch.full(shape, fill, dtype=dtype, device=device))
            else:
                raise ValueError(f"{name} has no entry for {bits} bits; it has {list(values)}")
        return torch.stack(rows)
    if not isinstance(values, Tensor):
        values = torch.as_tensor(values, device=device)
    _check_entry(values, name, dtype, device)
    if values.dim() == 0:
        values = values[None]
    wanted = (len(options), *shape)
    without_32 = (len(options) - 1, *shape)
    if options[-1] == 32 and fill is not None and tuple(values.shape) == without_32:
        values = torch.cat([values, values.new_full((1, *shape), fill)])
    if tuple(values.shape) != wanted:
        raise ValueError(
            f"{name} must have shape {wanted} for the widths {tuple(options)}, "
            f"got {tuple(values.shape)}"
        )
    return _cast(values, dtype).contiguous()


def _check_entry(value: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> None:
    if dtype.is_floating_point != value.is_floating_point() or value.dtype == torch.bool:
        kind = "floating point" if dtype.is_floating_point else "an integer type"
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but the input is on {device}")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``; integers out of its range stay out of every allowed range."""
    if dtype == torch.int32 and value.dtype != torch.int32:
        value = value.clamp(-1, torch.iinfo(torch.int32).max)
    return value.to(dtype)
