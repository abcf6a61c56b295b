"""From queued to a sandbox and to its first tool result: ours by webhook and by polling, and the SDK's worker.

One session at a time, so that none waits for another. A sandbox here is a process of this machine: on Fargate its start
takes as long as the image's pull and a microVM's boot do, which nobody has measured here.
"""

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx

from bench import far_sides
from bench.measuring import ROOT, isolated_python
from local.demo import Demo, bash
from local.stack import Stack, running
from shared.record import Phase

SESSIONS = 8
PARAMETERS = {"LeaseTtlSeconds": "60", "MaxIdleSeconds": "1", "StopTimeoutSeconds": "20"}
POLLING = {"PollWindowSeconds": "58"}
SCRIPT = [bash("echo result-$((6*7))", "result-42")]
_PATIENCE = 120.0


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds, p50 and p95; the first session of each way warms it up and does not count."""
    results: dict[str, Any] = {"sessions": SESSIONS}
    with running(1.0, say, PARAMETERS) as stack:
        results["webhook"] = _ours(stack)
        say(f"pickup by webhook: {results['webhook']}")
        stack.deploy(say, PARAMETERS | POLLING)
        nobody = {"url": "http://127.0.0.1:9/", "key": stack.keys[2]}
        httpx.post(f"{stack.api_url}/_control/webhook", json=nobody, timeout=10).raise_for_status()
        results["polling"] = _ours(stack)
        say(f"pickup by polling: {results['polling']}")
    results["peer"] = _peer()
    say(f"pickup by the SDK's worker: {results['peer']}")
    return {**results, "pickup_p50_ms": results["webhook"]["accepted_p50_ms"]}


def _ours(stack: Stack) -> dict[str, int]:
    demo, accepted, answered = Demo(stack), list[float](), list[float]()
    for number in range(SESSIONS + 1):
        work_id = demo.control("POST", "sessions", {"script": SCRIPT})["sessions"][0]["work_id"]
        _wait(lambda work_id=work_id: demo.records().get(work_id, {}).get("phase") == Phase.STOPPED)  # type: ignore[misc]
        queued, result = _at_the_api(stack.api_url, work_id)
        timeline = demo.records()[work_id]["timeline"]
        # ECS's word that it runs may come before the launcher has noted that RunTask took it
        started = next(float(moment["at"]) for moment in timeline if moment["event"] in ("task started", "running"))
        if number:
            accepted.append(started - queued)
            answered.append(result - queued)
        time.sleep(random.random())  # so that polls and sessions do not fall into step
    return _percentiles("accepted", accepted) | _percentiles("result", answered)


def _peer() -> dict[str, int]:
    answered = list[float]()
    with far_sides.emulator(0) as emulator:
        argv, environment = isolated_python("peer", ["work"], emulator.settings())
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=sys.stderr
        )
        try:
            for number in range(SESSIONS + 1):
                made = emulator.control("POST", "sessions", {"script": SCRIPT})["sessions"][0]
                _wait(lambda made=made: _item(emulator.url, made["work_id"])["state"] == "stopped")  # type: ignore[misc]
                queued, result = _at_the_api(emulator.url, made["work_id"])
                if number:
                    answered.append(result - queued)
                time.sleep(random.random())
        finally:
            process.communicate(timeout=30)  # the end of its input ends it
    return _percentiles("result", answered)


def _item(api_url: str, work_id: str) -> dict[str, Any]:
    state = httpx.get(f"{api_url}/_control/state", timeout=10).raise_for_status().json()
    found: dict[str, Any] = next(item for item in state["work"] if item["id"] == work_id)
    sessions = {session["session_id"]: session for session in state["sessions"]}
    return {**found, "results": sessions[found["data"]["id"]]["results"]}


def _at_the_api(api_url: str, work_id: str) -> tuple[float, float]:
    """Epoch ms of the item's queuing and of its first tool result, both by the API's clock, which is this machine's."""
    item = _item(api_url, work_id)
    queued, result = (datetime.fromisoformat(text) for text in (item["created_at"], item["results"][0]["at"]))
    return queued.timestamp() * 1000, result.timestamp() * 1000


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"a session was not served within {_PATIENCE:.0f} s")
        time.sleep(0.1)


def _percentiles(name: str, values: list[float]) -> dict[str, int]:
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
    return {f"{name}_p50_ms": round(statistics.median(values)), f"{name}_p95_ms": round(p95)}
