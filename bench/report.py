"""Shows what was measured: Markdown with plots beside it, JSON for machines, and the one line. It measures nothing."""

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil

from bench.as_lambda import SDK
from bench.cold_start import CACHED, SOURCE

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

OURS, PEER = "#2b6cb0", "#a0aec0"
SIDES = {"ours": "ours", "peer": "official SDK", "bare": "bare client"}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """report.md, results.json and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sections = [
        "# Measurements",
        "Written by `make bench`. Ratios compare what ran in turns in the same run; other figures are this machine's.",
        machine(results["machine"]),
    ]
    for name, show in (("dispatch", dispatch), ("beats", beats), ("cold_start", cold_start)):
        if name in results:
            sections.append(show(results[name], folder))
    (folder / "report.md").write_text("\n\n".join(sections) + "\n")


def this_machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    return {
        "cpus": psutil.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "load_before": round(psutil.getloadavg()[0], 1),
    }


def machine(found: Mapping[str, Any]) -> str:
    busy = found["load_before"] > found["cpus"] / 2
    return (
        f"Machine: {found['cpus']} CPUs ({found['architecture']}, {found['system']}), {found['memory_gb']} GB, Python "
        f"{found['python']}. Load before the run: {found['load_before']}"
        + (" (**busy: other work ran beside it**)." if busy else ".")
    )


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *([shown(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    """Three digits at most after what matters."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def dispatch(found: Mapping[str, Any], folder: Path) -> str:
    trips = {name: runs for name, runs in found.items() if name.endswith("_ms")}
    _rates_plot({name: _rates(runs, "items_per_s") for name, runs in trips.items()}, "items/s", folder / "dispatch.png")
    rows = (
        (
            name.replace("_ms", " ms"),
            SIDES[side],
            run["items_per_s"],
            run.get("peak_mb", "-"),
            run.get("cpu_ms", "-"),
            run["emulator_cpu_ms"],
            run["local_aws_cpu_ms"],
        )
        for name, runs in trips.items()
        for side, run in runs.items()
    )
    return "\n\n".join(
        (
            "## Dispatch",
            f"A burst of {found['items']} items. Ours stores each before its ack, claims it, stores that and enqueues "
            "it, all through the poller's code and the local AWS; the SDK's poller, draining, acks, and claims by a "
            "first heartbeat beside its next poll. The bare client shows what the emulator can do. All share the CPUs: "
            "the far sides' CPU time an item tells how much of them is not ours. Targets at 50 ms: 6 times the SDK's "
            "items/s, 0.8 times its memory.",
            table(("round trip", "", "items/s", "peak MB", "CPU ms an item", "emulator's", "local AWS's"), rows),
            f"At 50 ms **{found['dispatch_ratio']} times** the SDK's rate, {found['memory_ratio']} times its memory.",
            "![items a second](dispatch.png)",
        )
    )


def beats(found: Mapping[str, Any], folder: Path) -> str:
    counts = {name: runs for name, runs in found.items() if name.isdecimal()}
    plotted = {f"{name} leases": _rates(runs, "beats_per_s") for name, runs in counts.items()}
    _rates_plot(plotted, "beats/s", folder / "beats.png")
    rows = (
        (
            name,
            SIDES[side],
            run["seconds"],
            run["beats_per_s"],
            run["cpu_ms"] or "-",
            run["peak_mb"] or "-",
            run["emulator_cpu_ms"],
            run["local_aws_cpu_ms"],
        )
        for name, runs in counts.items()
        for side, run in runs.items()
    )
    return "\n\n".join(
        (
            "## Beats",
            "All leases due at once, 50 ms round trip. Ours is one keeper call: it reads the index and the leases, "
            "beats, and stores each reply; the SDK's side beats, 50 at once, and stores nothing. Targets: 1.5 times "
            "the SDK's beats/s at no more CPU a beat, 500 leases well inside 3 s.",
            table(("leases", "", "s", "beats/s", "CPU ms a beat", "peak MB", "emulator's CPU ms", "local AWS's"), rows),
            f"500: **{found['beat_ratio']} times** the SDK's beats/s at {found['cpu_ratio']} times its CPU a beat.",
            "![beats a second](beats.png)",
        )
    )


def _rates(runs: Mapping[str, Mapping[str, float]], what: str) -> dict[str, float]:
    return {SIDES[side]: run[what] for side, run in runs.items()}


def _rates_plot(groups: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    figure, panels = plt.subplots(1, len(groups), figsize=(7, 2.6), layout="constrained", squeeze=False)
    for axes, (name, rates) in zip(panels[0], groups.items(), strict=True):
        axes.bar(list(rates), list(rates.values()), color=[OURS, PEER, "#e2e8f0"])
        axes.set_title(name.replace("_ms", " ms round trip"), fontsize=10)
        axes.set_ylabel(unit)
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cold_start(found: Mapping[str, Any], folder: Path) -> str:
    starts, sizes = found["starts"], found["sizes"]
    cached, source = starts[CACHED], starts[SOURCE]
    _cold_start_plot(cached, folder / "cold_start.png")
    return "\n\n".join(
        (
            "## Cold start",
            "Import and build of each function in a fresh process, as Lambda does it, against importing the official "
            "SDK. CPU ms, medians; the ratio's target is at most 0.35. `source`: as if the layer had no bytecode.",
            table(
                ("", "import", "build", "ratio to the SDK's import", "peak MB", "from source", "ratio"),
                (
                    (
                        "official SDK, one client" if name == SDK else name,
                        one["import_ms"],
                        one["build_ms"],
                        one["ratio"],
                        one["peak_mb"],
                        source[name]["import_ms"] + source[name]["build_ms"],
                        source[name]["ratio"],
                    )
                    for name, one in cached.items()
                ),
            ),
            "![cold starts](cold_start.png)",
            "What each step adds to those before it, CPU ms, with bytecode:",
            table(("step", "ms"), found["imports"].items()),
            f"Bytecode of this layer: {sizes['layer_bytecode']}. A deploy uploads {sizes['zipped_mb']} MB zipped "
            "(target: under 20):",
            table(
                ("part", "zipped MB", "MB"),
                ((name, part["zipped_mb"], part["mb"]) for name, part in sizes["parts"].items()),
            ),
        )
    )


def _cold_start_plot(cached: Mapping[str, Mapping[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    names = list(cached)
    for part, colours, left in (
        ("import_ms", (PEER, OURS), [0.0] * len(names)),
        ("build_ms", ("#cbd5e0", "#90cdf4"), [cached[name]["import_ms"] for name in names]),
    ):
        colour = [colours[name != SDK] for name in names]
        axes.barh(names, [cached[name][part] for name in names], left=left, color=colour)
    axes.axvline(0.35 * cached[SDK]["import_ms"], color="black", linestyle=":", label="target")
    axes.invert_yaxis()
    axes.set_xlabel("CPU ms of a cold start: import (dark), build of clients (light)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
