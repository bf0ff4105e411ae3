"""Tables and plots of what was measured."""

from dfs.report.plots import plot_decisions, require_plotting
from dfs.report.tables import ResultRow, results_table

__all__ = ["ResultRow", "plot_decisions", "require_plotting", "results_table"]
