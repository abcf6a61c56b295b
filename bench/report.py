"""Shows what was measured: Markdown with plots beside it, JSON for machines, and the one line. It measures nothing."""

import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil

from bench.as_lambda import SDK
from bench.cold_start import CACHED, SOURCE

mpl.use("Agg")  # no display
from matplotlib import pyplot as plt

OURS, PEER = "#2b6cb0", "#a0aec0"
SIDES = {"unstored": "ours, in memory", "ours": "ours", "peer": "official SDK", "bare": "bare client"}
COLOURS = {"unstored": "#90cdf4", "ours": OURS, "peer": PEER, "bare": "#e2e8f0"}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """report.md, results.json and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sections = [
        "# Measurements",
        "Written by `make bench`. Ratios compare what ran in turns in the same run; other figures are this machine's.",
        machine(results["machine"]),
    ]
    for name, show in _sections():
        if name in results:
            sections.append(show(results[name], folder))
    (folder / "report.md").write_text("\n\n".join(sections) + "\n")


def _sections() -> tuple[tuple[str, Callable[[Mapping[str, Any], Path], str]], ...]:
    """In the report's order."""
    return (
        ("dispatch", dispatch),
        ("beats", beats),
        ("simulated", simulated),
        ("cold_start", cold_start),
        ("pickup", pickup),
        ("cost", cost),
    )


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
            "the far sides' CPU time an item tells how much of them is not ours. Targets: at 50 ms 6 times the SDK's "
            "items/s (it is not given the time for all of them); at 0 ms, where both take all, 0.8 times its memory.",
            table(("round trip", "", "items/s", "peak MB", "CPU ms an item", "emulator's", "local AWS's"), rows),
            f"**{found['dispatch_ratio']} times** the SDK's rate, {found['memory_ratio']} times its memory.",
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
            "All leases due at once, 50 ms round trip. Ours is one keeper call; the SDK beats 50 at once. In memory: "
            "as the SDK's side, ours keeps the values in its process. `ours` alone is what it does when deployed: it "
            "reads the index and the leases, and stores each reply, on a local AWS that needs the same CPUs. Targets: "
            "1.5 times the SDK's beats/s at no more CPU a beat, 500 leases well inside 3 s.",
            table(("leases", "", "s", "beats/s", "CPU ms a beat", "peak MB", "emulator's CPU ms", "local AWS's"), rows),
            f"500: **{found['beat_ratio']} times** the SDK's beats/s in memory; {found['stored_ratio']} times "
            f"where each reply is stored, at {found['cpu_ratio']} times its CPU a beat.",
            "![beats a second](beats.png)",
        )
    )


def simulated(found: Mapping[str, Any], _: Path) -> str:
    return "\n\n".join(
        (
            "## Lateness",
            f"{found['minutes']} simulated minutes of {found['leases']} leases (ttl 300 s), {found['failing']:.0%} of "
            f"the API's beats failing: no beat came more than **{found['latest_s']} s** after its due time (allowed: "
            f"{found['allowed_s']:.0f} s), {found['lost']} leases were lost. {found['rounds']} rounds, at most "
            f"{found['calls_per_minute_max']} calls of the API a minute, {found['writes_a_beat']} writes a beat.",
        )
    )


def pickup(found: Mapping[str, Any], _: Path) -> str:
    ways = {"webhook": "ours, webhook", "polling": "ours, polling", "peer": "official SDK's worker"}
    names = ("accepted_p50_ms", "accepted_p95_ms", "result_p50_ms", "result_p95_ms")
    return "\n\n".join(
        (
            "## Pickup",
            "From queued to RunTask accepted and to the first tool result, ms, on the local stack; "
            f"{found['sessions']} sessions, one at a time. A sandbox is a process here: Fargate's own start is not in "
            "it. The SDK's worker runs all the time and serves in its own process.",
            table(
                ("", "accepted p50", "p95", "first result p50", "p95"),
                ((label, *(found[way].get(name, "-") for name in names)) for way, label in ways.items()),
            ),
        )
    )


def cost(found: Mapping[str, Any], folder: Path) -> str:
    hours = found["session_hours"]
    _cost_plot(hours, folder / "cost.png")
    return "\n\n".join(
        (
            "## Cost",
            f"List prices of {found['region']}, {found['as_of']} (shared/prices.toml, with its sources), no free tier. "
            f"An idle month: **${found['idle_usd']:.2f}** for control plane and secrets, webhook included; "
            f"alarms and dashboard ${found['observability_usd']:.2f} more. Targets: $1.50 idle; the loop "
            "at most 2e-4 a session-hour at 100 sessions, 1.2e-4 at 10,000, writes included.",
            "USD a session-hour of keeping leases, 30 s beats: a stop is noticed within 31 s. Rounds in which nothing "
            "ends; while a turn is stopping, the loop's rounds come every 3 s, up to 1,200 of 5 transitions an hour "
            "($0.15). Sandboxes cost extra, and the same everywhere.",
            table(
                ("sessions", "this stack", "a loop a session", "SDK worker on Fargate", "a keeper call takes, s"),
                ((n, h["ours"], h["loop_each"], h["worker"], h["keeper_s"]) for n, h in hours.items()),
            ),
            f"From counts (tests/unit/test_counts.py) and {found['cpu_ms']['ours']} ms of CPU a beat, measured here, "
            f"with Lambda's share of a CPU at {found['keeper_mb']} MB. Over 500 sessions: so many shards or stacks.",
            "![USD a session-hour](cost.png)",
        )
    )


def _cost_plot(hours: Mapping[str, Mapping[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = {"ours": "this stack", "loop_each": "a loop a session", "worker": "SDK worker on Fargate"}
    for (key, name), style in zip(names.items(), ("-o", ":s", "--^"), strict=True):
        axes.loglog([int(n) for n in hours], [hour[key] for hour in hours.values()], style, label=name)
    axes.set_xlabel("sessions")
    axes.set_ylabel("USD a session-hour")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme_table(results: Mapping[str, Any]) -> str:
    """The README's part: what was measured, its target, the machine."""
    found = results
    rows: list[tuple[str, object, str]] = []
    if "dispatch" in found:
        rows.append(("dispatch at 50 ms, against the SDK's poller", f"{found['dispatch']['dispatch_ratio']} x", "6 x"))
        at_once = {side: run["items_per_s"] for side, run in found["dispatch"]["0_ms"].items()}
        rows.append(("the same without a round trip", f"{at_once['ours'] / at_once['peer']:.2f} x", "-"))
        rows.append(("its peak memory", f"{found['dispatch']['memory_ratio']} x", "0.8 x"))
    if "beats" in found:
        told = found["beats"]
        rows.append(("beats/s of 500 leases, in memory as the SDK's", f"{told['beat_ratio']} x", "1.5 x"))
        rows.append(("the same, each reply stored, the local AWS on these CPUs", f"{told['stored_ratio']} x", "-"))
        rows.append(("CPU a beat, each reply stored", f"{told['cpu_ratio']} x", "1 x"))
        rows.append(("500 leases beaten and stored", f"{told['500']['ours']['seconds']} s", "3 s"))
    if "cold_start" in found:
        start = found["cold_start"]
        rows.append(("worst cold start, against importing the SDK", f"{start['coldstart_ratio']} x", "0.35 x"))
        rows.append(("a deploy, zipped", f"{start['sizes']['zipped_mb']} MB", "20 MB"))
    if "pickup" in found:
        told = found["pickup"]["webhook"]
        rows.append(("queued to RunTask accepted, by webhook, p50", f"{told['accepted_p50_ms']} ms", "1,000 ms"))
        rows.append(("its p95", f"{told['accepted_p95_ms']} ms", "-"))
    if "cost" in found:
        rows.append(("idle month, without alarms and dashboard", f"${found['cost']['idle_usd']:.2f}", "$1.50"))
        for sessions, target in ((100, "2e-4"), (10000, "1.2e-4")):
            told = f"${found['cost'][f'loop_usd_{sessions}']:.1e}"
            rows.append((f"leases kept, a session-hour at {sessions:,}", told, f"${target}"))
    return table(("", "measured", "target"), rows) + "\n\n" + machine(found["machine"])


def _rates(runs: Mapping[str, Mapping[str, float]], what: str) -> dict[str, float]:
    return {side: run[what] for side, run in runs.items()}


def _rates_plot(groups: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    figure, panels = plt.subplots(1, len(groups), figsize=(7, 2.6), layout="constrained", squeeze=False)
    for axes, (name, rates) in zip(panels[0], groups.items(), strict=True):
        names = [SIDES[side].replace(", ", ",\n").replace(" ", "\n") for side in rates]
        axes.bar(names, list(rates.values()), color=[COLOURS[side] for side in rates])
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
