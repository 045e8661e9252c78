"""The loss curve as a picture."""

from io import BytesIO
from pathlib import Path
from typing import Any

from llmpipe.files import atomic_file


def plot_loss(curves: list[dict[str, Any]], title: str, path: Path) -> None:
    """Training loss and learning rate over the steps, as SVG: the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [line["step"] for line in curves]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    loss.plot(steps, [line["loss"] for line in curves], color="tab:blue", label="loss")
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
