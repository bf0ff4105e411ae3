"""Bitwidths: which exist, and the code ranges and weight levels that go with each."""

from __future__ import annotations

from collections.abc import Sequence

# What the compiled kernels do. 0 (skip) is always accepted and never listed.
KERNEL_WIDTHS = (2, 4, 8, 32)
DEFAULT_OPTIONS = (2, 4, 8, 32)
# What the reference and training take besides 32.
INTEGER_WIDTHS = tuple(range(1, 17))
# Scales outside this range are refused: their reciprocals would not be normal floats.
MIN_SCALE = 2.0**-126
MAX_SCALE = 2.0**126

LEVEL_KINDS = ("twos", "centred")


def check_options(options: Sequence[int], name: str = "bit_options") -> tuple[int, ...]:
    """``options`` as a tuple, checked to be ascending and made of known non-zero widths."""
    values = tuple(options)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must hold ints, got {value!r}")
        if value != 32 and value not in INTEGER_WIDTHS:
            raise ValueError(f"{name} may hold 1 to 16 and 32, got {value} in {values}")
    if not values:
        raise ValueError(f"{name} must not be empty")
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name} must be ascending without repeats, got {values}")
    return values


def default_levels(bits: int) -> str:
    """The weight levels used at a width unless said otherwise."""
    return "centred" if bits <= 2 else "twos"


def activation_max(bits: int) -> int:
    """The largest unsigned activation code."""
    return (1 << bits) - 1


def weight_range(bits: int) -> tuple[int, int]:
    """The smallest and largest signed weight code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def check_accumulator(taps: int, options: Sequence[int], centred: Sequence[bool]) -> None:
    """Refuse a convolution whose int32 accumulator could overflow at a kernel width.

    Raises:
        ValueError: taps * max|q_x - z| * max|level| exceeds 2^31 - 1.
    """
    for bits, is_centred in zip(options, centred, strict=True):
        if bits not in KERNEL_WIDTHS or bits == 32:
            continue
        level = (1 << bits) - 1 if is_centred else 1 << (bits - 1)
        worst = taps * activation_max(bits) * level
        if worst > 2**31 - 1:
            raise ValueError(
                f"weight sums {taps} products an output, which can reach {worst} at {bits} bits "
                f"and overflow the int32 accumulator (limit {2**31 - 1})"
            )
