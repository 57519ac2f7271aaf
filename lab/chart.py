"""Draw what each setting costs, from the figures of lab/benchmark.py.

  pip install -r requirements.txt
  pip install --group benchmark
  python -m lab.chart docs/benchmark.json

writes docs/benchmark-light.svg and docs/benchmark-dark.svg. It needs neither servers nor Docker.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lab.benchmark import multiples
from lab.benchmark_tasks import DEFAULT, PRICES
from lab.servers import STORES

STORE_COLOURS = ("#d9622b", "#3b82c4")  # to be told apart on white and on black, and by the colour-blind
BARS = {DEFAULT: "Celery's defaults", **{name: name for name in PRICES}}
TEXT_COLOURS = {"light": "#24292f", "dark": "#e6edf3"}


def draw(run: dict[str, Any], text: str, target: Path) -> None:
    """Write the chart as SVG, with this colour of text on no background."""
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    axes = figure.add_subplot()
    for number, (store, colour) in enumerate(zip(STORES, STORE_COLOURS, strict=True)):
        for row, settings in enumerate(BARS):
            if found := multiples(run, store, settings):
                place, middle = row + (number - 0.5) * 0.4, statistics.median(found)
                axes.barh(place, middle, height=0.36, color=colour, label=None if row else store)
                axes.plot([min(found), max(found)], [place, place], color=text, linewidth=1)
                axes.text(max(found), place, f" {middle:.2f}", va="center", color=text, fontsize=9)
    axes.axvline(1, color=text, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(BARS)), list(BARS.values()))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(text)
    axes.tick_params(colors=text)
    axes.set_title(f"Tasks a second, as a multiple of our settings ({run['date'][:10]})", color=text, fontsize=12)
    axes.set_xlabel("median; the line goes from the lowest to the highest round", color=text)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, labelcolor=text)
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})


def main(source: Path) -> None:
    """Draw the chart for light and for dark pages, beside the figures."""
    run = json.loads(source.read_text())
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.family": "sans-serif"})
    for theme, text in TEXT_COLOURS.items():
        draw(run, text, source.with_name(f"{source.stem}-{theme}.svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
