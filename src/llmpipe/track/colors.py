"""A colour for each training's lines: those that MLflow makes of a run's id are often the same for two."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

COLOR = "mlflow.runColor"
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
"""In turn; matplotlib's ten."""


def color_after(color: str) -> str:
    """The next one."""
    return COLORS[(COLORS.index(color) + 1) % len(COLORS)]


def free_color(client: "MlflowClient", experiment_id: str) -> str:
    """One that none of the nine trainings has that began last."""
    newest = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment_id], f"tags.`{COLOR}` != ''", max_results=len(COLORS) - 1, order_by=newest)
    used = {run.data.tags[COLOR] for run in runs}
    return next(color for color in COLORS if color not in used)
