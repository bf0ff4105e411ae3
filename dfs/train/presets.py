"""Settings to start from, as TOML files: the package's own by name, or a file of the user's.

The table ``dataset_settings.NAME`` of a file holds what differs on the data set of that name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfs.train.config import TrainConfig, settings_from

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "presets"
_PER_DATASET = "dataset_settings"


def preset_names() -> tuple[str, ...]:
    """The package's presets."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_preset(name: str, dataset: str | None = None) -> TrainConfig:
    """A preset's settings.

    Args:
        name: one of the package's, or the path of a TOML file, such as a run's ``config.toml``.
        dataset: the data set it is to be used on, if not its own.

    Raises:
        ValueError: there is no such preset, or naming what in it is wrong.
    """
    path = _FOLDER / f"{name}.toml" if name in preset_names() else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        known = ", ".join(preset_names())
        raise ValueError(f"preset must be one of {known}, or a TOML file, got {name!r}")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        special = values.pop(_PER_DATASET, {})
        used = dataset or values.get("dataset", TrainConfig.dataset)
        return settings_from({**values, **special.get(used, {}), "dataset": used})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"preset {name}: {error}") from error


def to_toml(values: Mapping[str, Any]) -> str:
    """Strings, numbers and lists of them, a line each; what JSON writes of these is TOML."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
