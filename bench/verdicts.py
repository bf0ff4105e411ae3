"""How a judged bar is printed."""

from __future__ import annotations

from typing import Any

# How the reason begins for which a benchmark is skipped that did not get its turn.
TOO_LATE = "too late"


def verdict_line(outcome: dict[str, Any]) -> str:
    """One bar's outcome, as its benchmark put it into ``extra_info``."""
    limit, low, high = (outcome[name] for name in ("limit", "low", "high"))
    clear = high <= limit or low > limit
    word = ("held  " if outcome["held"] else "MISSED") + (" " if clear else "?")
    relation = ">=" if outcome.get("at_least") else "<="
    if "threads" in outcome:
        where = f"threads {outcome['threads']}"
    else:
        where = outcome["implementation"]
    line = (
        f"{word} {outcome['ratio']:7.3f} {relation} {limit:<5g} [{low:.3f} to {high:.3f}]  "
        f"{outcome['label']}, {outcome['layer']} batch {outcome['batch']}, {where}"
    )
    if "fraction_of_peak" in outcome:
        line += f", {100 * outcome['fraction_of_peak']:.0f} % of the peak"
    return line
