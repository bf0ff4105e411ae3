"""What the benchmarks need to know about the processor."""

from __future__ import annotations

import os
import platform
import time
from functools import cache
from pathlib import Path

# The kernels that the bars were set for use both.
WANTED_FLAGS = ("avx512_vnni", "avx512vbmi")
_FALLBACK_CACHE = 32 << 20


def cpu_count() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """Such as "AMD EPYC (family 25, model 17)"."""
    info = _cpuinfo()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info.get('cpu family')}, model {info.get('model')})"


def busy_share(seconds: float = 0.5) -> float:
    """How much of the processors' time others take, measured while this process sleeps.

    Between 0 and 1; 0 where the system does not tell. What a hypervisor gives to somebody else
    counts as taken.
    """
    before = _processor_times()
    time.sleep(seconds)
    spent = [b - a for a, b in zip(before, _processor_times(), strict=True)]
    idle = sum(spent[3:5])
    return 1 - idle / sum(spent) if sum(spent) else 0.0


def _processor_times() -> list[int]:
    """User, nice, system, idle, waiting for input or output, interrupts (two), stolen."""
    path = Path("/proc/stat")
    if not path.exists():
        return []
    return [int(ticks) for ticks in path.read_text().split(maxsplit=9)[1:9]]


def missing_flags() -> tuple[str, ...]:
    """What the processor lacks of the instruction sets that the bars were set for."""
    flags = _cpuinfo().get("flags", "").split()
    return tuple(flag for flag in WANTED_FLAGS if flag not in flags)


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes) or _FALLBACK_CACHE
