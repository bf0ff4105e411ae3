"""The op calls that public functions make, for ``torch.library.opcheck``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dfs_kernels import functional
from tests.kernels.cases import INPUT_FORMS, OUTPUT_FORMS, RESIDUAL_FORMS

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Recorder:
    """Stands in for ``torch.ops.dfs`` and keeps what the public functions call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.dfs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((op.default, args, kwargs))
            return op(*args, **kwargs)

        return call


def calls_of(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The op calls that a public function makes."""
    recorder = _Recorder()

    class Torch:
        ops = type("ops", (), {"dfs": recorder})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "torch", Torch())
        run()
    assert recorder.calls
    return recorder.calls


def check_op(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    results = torch.library.opcheck(op, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


def checkable_forms() -> list[tuple[str, str | None, str, bool]]:
    """Each form of each argument at least once, with both kinds of weight."""
    found = []
    for i, input_form in enumerate(INPUT_FORMS):
        for j, output_form in enumerate(OUTPUT_FORMS):
            if output_form == "own":
                continue  # its rows have unspecified bytes, which opcheck would compare
            residual = RESIDUAL_FORMS[(i + j) % len(RESIDUAL_FORMS)]
            if output_form == "in_place" and residual is None:
                residual = "float"
            found.append((input_form, residual, output_form, (i + j) % 2 == 0))
    return found
