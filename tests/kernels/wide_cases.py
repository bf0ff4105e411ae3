"""Random mixed convolutions of the shapes that vectorized kernels care about."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.kernels.cases import INPUT_FORMS, OUTPUT_FORMS, RESIDUAL_FORMS, ConvCase

KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 7), (7, 1))
# Where planes of common networks end, and vectors of 8 or 16 pixels.
_SIDES = (7, 8, 14, 16, 28, 32, 56)
_OPTIONS = ((2, 4, 8, 32), (2, 4, 8), (2,), (4,), (8,), (2, 8), (4, 8), (8, 32))

# Products of one sample, and values that the reference unfolds for it. Few cases are large ones,
# which cross the bands of rows and the blocks that kernels work in.
_ORDINARY = (2_500_000, 400_000)
_LARGE = (25_000_000, 3_000_000)
_LARGE_SHARE = 0.05


def draw_case(random: Random) -> ConvCase:
    """Any mixed convolution that is not too large for the reference."""
    most = _LARGE if random.random() < _LARGE_SHARE else _ORDINARY
    while True:
        case: ConvCase | None = _draw(random)
        while case is not None and not _is_within(case, *most):
            case = _halved(case)
        if case is not None:
            return case


def _is_within(case: ConvCase, max_products: int, max_unfolded: int) -> bool:
    geometry = case.geometry
    values = case.output_shape[2] * case.output_shape[3] * geometry.taps
    return values * geometry.out_channels <= max_products and values * case.groups <= max_unfolded


def _halved(case: ConvCase) -> ConvCase | None:
    """The case on half the rows or, when there is one, half the columns; None if it has no room."""
    left, right, top, bottom = case.padding
    spans = [d * (k - 1) + 1 for d, k in zip(case.dilation, case.kernel, strict=True)]
    least = (max(spans[0] - top - bottom, 1), max(spans[1] - left - right, 1))
    height, width = case.size
    if height > least[0]:
        return replace(case, size=(max(height // 2, least[0]), width))
    if width > least[1]:
        return replace(case, size=(height, max(width // 2, least[1])))
    return None


def _draw(random: Random) -> ConvCase:
    options = _OPTIONS[0] if random.random() < 0.65 else random.choice(_OPTIONS)
    groups, group_channels, group_outputs = _draw_channels(random)
    kernel = _draw_kernel(random)
    dilation = (1, 1) if random.random() < 0.7 else (random.randint(1, 3), random.randint(1, 3))
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    padding = _draw_padding(random, spans)
    height, width = _draw_size(random)
    residual = random.choice(RESIDUAL_FORMS)
    output = random.choice(OUTPUT_FORMS)
    if output == "in_place" and residual is None:
        residual = random.choice([form for form in RESIDUAL_FORMS if form is not None])
    return ConvCase(
        bits=tuple(random.choice((0, *options)) for _ in range(random.randint(1, 5))),
        options=options,
        centred=tuple(b != 32 and random.random() < (0.7 if b == 2 else 0.3) for b in options),
        group_channels=group_channels,
        group_outputs=group_outputs,
        groups=groups,
        kernel=kernel,
        stride=_draw_stride(random),
        dilation=dilation,
        padding=padding,
        size=(
            max(height, spans[0] - padding[2] - padding[3]),
            max(width, spans[1] - padding[0] - padding[1]),
        ),
        input_form=random.choice(INPUT_FORMS),
        packed_weight=random.random() < 0.5,
        residual_form=residual,
        output_form=output,
        output_bits=random.choice((2, 4, 8, 8, 32)),
        bias=random.random() < 0.5,
        mul=random.random() < 0.5,
        add=random.random() < 0.5,
        relu=random.random() < 0.5,
        extreme=random.random() < 0.2,
        offset=random.randint(0, 3) if random.random() < 0.5 else 0,
        seed=random.randrange(2**31),
    )


def _draw_channels(random: Random) -> tuple[int, int, int]:
    """Groups, and input and output channels of each."""
    kind = random.random()
    if kind < 0.25:
        return _near_vectors(random, 80), 1, random.randint(1, 3)
    if kind < 0.5:
        return random.randint(2, 5), _near_vectors(random, 40), random.randint(1, 20)
    return 1, _near_vectors(random, 130), _near_vectors(random, 80)


def _near_vectors(random: Random, most: int) -> int:
    """A multiple of 16, 32 or 64 or beside one, or few, or any number up to ``most``."""
    kind = random.random()
    if kind < 0.5:
        step = random.choice([step for step in (16, 32, 64) if step <= most])
        return min(step * random.randint(1, most // step) + random.randint(-1, 1), most)
    return random.randint(1, 8 if kind < 0.75 else most)


def _draw_kernel(random: Random) -> tuple[int, int]:
    kind = random.random()
    if kind < 0.3:
        return (1, 1) if kind < 0.1 else (3, 3)
    if kind < 0.85:
        return random.choice(KERNELS)
    return random.randint(1, 4), random.randint(1, 4)


def _draw_stride(random: Random) -> tuple[int, int]:
    if random.random() < 0.7:
        return (random.choice((1, 1, 2, 2, 3)),) * 2
    return random.randint(1, 3), random.randint(1, 3)


def _draw_padding(random: Random, spans: tuple[int, ...]) -> tuple[int, int, int, int]:
    kind = random.random()
    if kind < 0.2:
        return (0, 0, 0, 0)
    if kind < 0.5:
        vertical, horizontal = spans[0] // 2, spans[1] // 2
        return horizontal, horizontal, vertical, vertical
    # Wider than the kernel at times: then whole windows lie in it.
    most = [span + 3 if kind < 0.6 else max(span - 1, 2) for span in spans]
    horizontals = random.randint(0, most[1]), random.randint(0, most[1])
    return (*horizontals, random.randint(0, most[0]), random.randint(0, most[0]))


def _draw_size(random: Random) -> tuple[int, int]:
    if random.random() < 0.6:
        width = random.choice(_SIDES) + random.choice((-1, 0, 0, 1))
    else:
        width = random.randint(1, 40)
    kind = random.random()
    if kind < 0.2:
        return width, width
    height = random.randint(1, 9)
    return (height, width) if kind < 0.75 else (width, height)
