"""Tables, plots and pages of what was measured."""

from dfs.report.engine_times import engine_times_table, plot_engine_times
from dfs.report.plots import (
    COST_LABELS,
    pareto_front,
    plot_decisions,
    plot_sheet,
    plot_tradeoff,
    require_plotting,
)
from dfs.report.rivals import Comparison, compare_with_rivals
from dfs.report.run_report import REPORT_NAME, plot_run, write_run_report
from dfs.report.summary import (
    TABLE_NAMES,
    SummaryRow,
    describe_result,
    read_tables,
    rich_summary,
    summarise,
    write_tables,
)
from dfs.report.sweep_report import PLOTS, plot_sweep, write_sweep_report
from dfs.report.tables import ResultRow, results_table

__all__ = [
    "COST_LABELS",
    "PLOTS",
    "REPORT_NAME",
    "TABLE_NAMES",
    "Comparison",
    "ResultRow",
    "SummaryRow",
    "compare_with_rivals",
    "describe_result",
    "engine_times_table",
    "pareto_front",
    "plot_decisions",
    "plot_engine_times",
    "plot_run",
    "plot_sheet",
    "plot_sweep",
    "plot_tradeoff",
    "read_tables",
    "require_plotting",
    "results_table",
    "rich_summary",
    "summarise",
    "write_run_report",
    "write_sweep_report",
    "write_tables",
]
