"""Settings of a run as the command line gives them: a preset, common flags, ``--set``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from dfs.data.load import DIGITS
from dfs.train.config import TrainConfig
from dfs.train.presets import load_preset

Number = TypeVar("Number", int, float)

# Where nothing is said: what needs no files, and what suits a full-size data set.
_SMALL_PRESET, _PRESET = "digits", "fast"
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}


def configure(
    preset: str | None, overrides: Mapping[str, Any], settings: Sequence[str]
) -> TrainConfig:
    """The settings of a preset with some of them replaced.

    Args:
        preset: None takes what suits the data set.
        overrides: values by name.
        settings: texts "name=value", which come last.

    Raises:
        ValueError: naming what is unknown or out of range.
    """
    values = {**overrides, **parse_settings(settings)}
    dataset = values.get("dataset")
    if preset is None:
        preset = _SMALL_PRESET if dataset in (None, DIGITS) else _PRESET
    return replace(load_preset(preset, dataset), **values)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Values by name from texts "name=value"."""
    values = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator or name not in _DEFAULTS:
            wrong = "names no setting" if separator else "must be name=value"
            names = ", ".join(sorted(_DEFAULTS))
            raise ValueError(f"--set {wrong}, got {text!r}; the names are {names}")
        values[name] = _parse(name, value)
    return values


def contradictions(
    config: TrainConfig, preset: str | None, overrides: Mapping[str, Any], settings: Sequence[str]
) -> list[str]:
    """What was given that a run, which has its settings, does not agree with, each in words."""
    given = {**overrides, **parse_settings(settings)}
    wanted = {name: (name, value) for name, value in given.items()}
    if preset is not None:
        resolved = configure(preset, {"dataset": config.dataset, **given}, ())
        wanted |= {
            f.name: (f"preset {preset}: {f.name}", getattr(resolved, f.name))
            for f in fields(TrainConfig)
            if f.name not in given
        }
    return [
        f"{label}={_show(value)}, but the run has {_show(getattr(config, name))}"
        for name, (label, value) in wanted.items()
        if getattr(config, name) != value
    ]


def parse_widths(text: str, name: str) -> tuple[int, ...]:
    """Widths such as "0,2,4,8"."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise ValueError(f"{name} must be widths such as 0,2,4,8, got {text!r}") from error


def parse_numbers(text: str, name: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers such as "0.04,0.02"."""
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between, got {text!r}") from error


def _parse(name: str, text: str) -> Any:
    default = _DEFAULTS[name]
    if name == "exit_points":
        return _parse_exit_points(text)
    if not isinstance(default, tuple):
        try:
            return type(default)(text)
        except ValueError as error:
            raise ValueError(f"--set {name}: {text!r} is not {type(default).__name__}") from error
    if name in ("choices", "static_widths"):
        return parse_widths(text, f"--set {name}")
    parts = tuple(part for part in text.split(",") if part)
    if name != "milestones":
        return parts
    try:
        return tuple(map(float, parts))
    except ValueError as error:
        raise ValueError(f"--set {name} takes shares such as 0.5,0.75, got {text!r}") from error


def _parse_exit_points(text: str) -> tuple[tuple[int, float], ...]:
    """Such as "4:1.7,8:1.2"; empty for no check."""
    try:
        pairs = [item.split(":") for item in text.split(",") if item]
        return tuple((int(width), float(points)) for width, points in pairs)
    except ValueError as error:
        raise ValueError(
            f"--set exit_points takes WIDTH:POINTS pairs such as 4:1.7,8:1.2, got {text!r}"
        ) from error


def _show(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value)
