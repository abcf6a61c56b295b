"""A simulated day on the template's dashboard: `make dashboard-picture`. Sample data; nothing of it is AWS's.

Sessions come by the hour of an office day. There is trouble: a Spot wave at 10:00, no room from 11:00 to 11:40, the API
away for four minutes at 14:00, an image that is missing from 16:00 to 16:30. CloudWatch draws the widgets itself; here
matplotlib does, from the same JSON.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.simulation import cloudwatch
from tests.simulation.fleet import CONFIG, START, Fleet

HOUR_MS = 3_600_000
ARRIVALS = (1, 0, 0, 0, 0, 1, 2, 4, 8, 14, 16, 14, 8, 12, 16, 14, 12, 8, 5, 3, 2, 2, 1, 1)  # sessions by hour
COLUMNS, ROW_INCHES = 24, 0.42
_SHORT = {"alarm": "Alarms", "ALARM": "#d62728", "OK": "#2ca02c", "INSUFFICIENT_DATA": "#7f7f7f"}


def play_day(seed: int = 3, hours: int = 24) -> Fleet:
    """The fleet after its day; its processes are let go."""
    config = CONFIG.model_copy(update={"max_sessions": 12, "launch_timeout_seconds": 7_200})
    fleet = Fleet(seed, config=config)
    machine, fargate = fleet.machine, fleet.fargate

    def begin() -> None:
        """A turn of some minutes: a message is served in twenty seconds or so."""
        fleet.new_session().pending = machine.rng.randint(3, 40)

    fleet.schedule("poller", 60_000)
    fleet.schedule("janitor", 300_000)
    for hour, count in enumerate(ARRIVALS[:hours]):
        for _ in range(count):
            machine.later(hour * HOUR_MS + machine.rng.randint(0, HOUR_MS), begin)
    machine.later(10 * HOUR_MS, lambda: setattr(fargate, "reclaiming_spot_until", machine.now + 900_000))
    machine.later(11 * HOUR_MS, lambda: setattr(fargate, "full_until", machine.now + 2_400_000))
    machine.later(14 * HOUR_MS, lambda: fleet.api_goes_away(240))
    machine.later(16 * HOUR_MS, lambda: fargate.image_goes_missing(1_800_000))
    for hour in (9, 13, 15):
        machine.later(hour * HOUR_MS, lambda: fleet.faults.wanted.update({"sandbox crashes": 1}))
    try:
        machine.run(START + hours * HOUR_MS, lambda: bool(fleet.violations))
    finally:
        fleet.close()
    return fleet


def draw(fleet: Fleet, path: Path) -> None:
    """Every widget at its place of the grid, over the day."""
    widgets = cloudwatch.dashboard()
    rows = max(widget["y"] + widget["height"] for widget in widgets)
    figure = plt.figure(figsize=(21, rows * ROW_INCHES * 1.25), facecolor="white")
    for widget in widgets:
        left, width = widget["x"] / COLUMNS, widget["width"] / COLUMNS
        bottom = 1 - (widget["y"] + widget["height"]) / rows
        if widget["type"] == "text":
            text = widget["properties"]["markdown"].removeprefix("## ")
            figure.text(0.012, bottom + 0.25 / rows, text, fontsize=17, weight="bold")
            continue
        axes = figure.add_axes((left + 0.026, bottom + 0.7 / rows, width - 0.052, (widget["height"] - 1.3) / rows))
        (_draw_alarms if widget["type"] == "alarm" else _draw_graph)(axes, widget["properties"], fleet)
    figure.savefig(path, dpi=62)
    plt.close(figure)


def _draw_graph(axes: Axes, graph: dict[str, Any], fleet: Fleet) -> None:
    axes.set_title(graph["title"], fontsize=11, loc="left", weight="bold")
    seconds, start, end = graph["period"], START, fleet.machine.now
    values: dict[str, dict[int, float]] = {}
    lines: list[tuple[dict[str, Any], dict[int, float]]] = []
    for namespace, name, *dimension, options in (m for m in graph["metrics"] if isinstance(m[0], str)):
        found = fleet.measured.periods(
            (namespace, name, dimension[1] if dimension else ""), options["stat"], seconds, start, end
        )
        values[options.get("id", name)] = found
        lines.append((options, found))
    for (options,) in (m for m in graph["metrics"] if not isinstance(m[0], str)):
        times = sorted(set[int]().union(*values.values()))
        of_time = {at: {one: found.get(at, 0.0) for one, found in values.items()} for at in times}
        lines.append((options, {at: cloudwatch.evaluated(options["expression"], of_time[at]) for at in times}))
    shown = [(options, found) for options, found in lines if options.get("visible", True)]
    if graph["stacked"]:
        _stack(axes, shown, seconds)
    right = axes.twinx() if any(options.get("yAxis") == "right" for options, _ in shown) else None
    for n, (options, found) in enumerate([] if graph["stacked"] else shown):
        on_right = options.get("yAxis") == "right"
        target = right if right is not None and on_right else axes
        times = _with_gaps(found, seconds)
        hours = [(at - START) / HOUR_MS for at in times]
        style = ":" if on_right else "-"
        label = f"{options['label']}{' (right)' if on_right else ''}{'' if found else ' (no data)'}"
        target.plot(
            hours,
            [found.get(at, math.nan) for at in times],
            style,
            color=f"C{n}",
            marker=".",
            ms=3,
            lw=1.2,
            label=label,
        )
    axes.set_ylabel(graph["yAxis"]["left"]["label"], fontsize=8)
    if right is not None:
        right.set_ylabel(graph["yAxis"]["right"]["label"], fontsize=8)
        _leave_room(right)
        right.tick_params(labelsize=8)
    _leave_room(axes)
    _hours(axes, fleet)
    handles = [one for side in (axes, right) if side is not None for one in side.get_legend_handles_labels()[0]]
    names = [one for side in (axes, right) if side is not None for one in side.get_legend_handles_labels()[1]]
    axes.legend(handles, names, fontsize=7, loc="upper left", framealpha=0.75, ncols=2 if len(names) > 4 else 1)


def _with_gaps(found: dict[int, float], seconds: int) -> list[int]:
    """The times, and one without a value after each that no other follows: without data it was zero or unknown."""
    return sorted({*found, *(at + seconds * 1000 for at in found)})


def _leave_room(axes: Axes) -> None:
    """For the legend."""
    highest = axes.dataLim.ymax
    axes.set_ylim(0, highest * 1.6 if math.isfinite(highest) and highest > 0 else 1)


def _stack(axes: Axes, shown: list[tuple[dict[str, Any], dict[int, float]]], seconds: int) -> None:
    times = sorted(set[int]().union(*(found for _, found in shown)))
    hours, base = [(at - START) / HOUR_MS for at in times], [0.0] * len(times)
    for n, (options, found) in enumerate(shown):
        heights = [found.get(at, 0.0) for at in times]
        color, width = options.get("color", f"C{n}"), seconds / 3_600
        label = options["label"] + ("" if any(heights) else " (no data)")
        axes.bar(hours, heights, width, bottom=base, align="edge", color=color, label=label)
        base = [below + height for below, height in zip(base, heights, strict=True)]


def _draw_alarms(axes: Axes, properties: dict[str, Any], fleet: Fleet) -> None:
    """As they stand at the end of the day, and whether they rang during it."""
    alarms, across = cloudwatch.alarms(), 9
    axes.axis("off")
    axes.set_title("Alarms at the day's end (dark edge: rang during the day)", fontsize=11, loc="left", weight="bold")
    for n, name in enumerate(properties["alarms"]):
        minutes = range(START + 3_600_000, fleet.machine.now + 1, 60_000)
        states = [cloudwatch.state(alarms[name], fleet.measured, fleet.config, at) for at in minutes]
        x, y = n % across / across, 0.75 - n // across * 0.42
        rang = set(states) - {"OK"}
        edge = "black" if rang else "none"
        axes.text(
            x + 0.5 / across,
            y,
            name.removesuffix("Alarm"),
            ha="center",
            fontsize=8.5,
            va="center",
            color="white",
            bbox={"facecolor": _SHORT[states[-1]], "edgecolor": edge, "linewidth": 2.5, "boxstyle": "round,pad=0.35"},
        )


def _hours(axes: Axes, fleet: Fleet) -> None:
    axes.set_xlim(0, (fleet.machine.now - START) / HOUR_MS)
    axes.set_xticks(range(0, 25, 3), [f"{hour:02}:00" for hour in range(0, 25, 3)], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.day", description=__doc__)
    parser.add_argument("path", type=Path, help="where the picture goes (PNG)")
    options = parser.parse_args()
    fleet = play_day()
    for violation in fleet.violations:
        print(violation)
    draw(fleet, options.path)
    return 1 if fleet.violations else 0


if __name__ == "__main__":
    sys.exit(main())
