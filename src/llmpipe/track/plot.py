"""The loss curve as a picture."""

from io import BytesIO
from pathlib import Path
from typing import Any

from llmpipe.files import atomic_file


def plot_loss(curves: list[dict[str, Any]], title: str, path: Path) -> None:
    """Training loss, held-out loss and learning rate over the steps, as SVG: the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [line["step"] for line in curves]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    losses = [float("nan") if line["loss"] is None else line["loss"] for line in curves]  # of skipped steps
    loss.plot(steps, losses, color="tab:blue", label="loss")
    evaluated = [line for line in curves if line.get("eval_loss") is not None]
    if evaluated:
        points = [line["step"] for line in evaluated], [line["eval_loss"] for line in evaluated]
        loss.plot(*points, color="tab:orange", marker="o", markersize=3, label="held-out loss")
    loss.grid(alpha=0.3)
    rate = loss.twinx()
    rate.plot(
        steps,
        [line.get("lr", float("nan")) for line in curves],
        color="tab:gray",
        linestyle="--",
        linewidth=1,
        label="lr",
    )
    rate.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=2)
    picture = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "llmpipe"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    if path.is_file() and path.read_bytes() == picture.getvalue():
        return  # its time stamp means something to Snakemake
    with atomic_file(path) as file:
        file.write(picture.getvalue())
