"""The official SDK's side of a measurement, in a process of its own, used as its documentation has it.

`measuring.side("peer", ...)` starts it; the last line printed is the answer.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

from bench import as_lambda

NO_HEARTBEAT = "NO_HEARTBEAT"


def client() -> Any:
    import anthropic  # noqa: PLC0415  found only once the path is set

    return anthropic.AsyncAnthropic(auth_token=os.environ["ENVIRONMENT_KEY"], base_url=os.environ["FLEET_BASE_URL"])


async def dispatch(longest_seconds: float) -> dict[str, Any]:
    """Its poller, draining; each item's first heartbeat is a task of its own, so that it holds up no poll."""
    environment_id, key = os.environ["FLEET_ENVIRONMENT_ID"], os.environ["ENVIRONMENT_KEY"]
    async with client() as sdk:
        work, beats = sdk.beta.environments.work, []
        poller = work.poller(
            environment_id=environment_id, environment_key=key, block_ms=None, drain=True, auto_stop=False
        )
        began, cpu = time.perf_counter(), time.process_time()
        async for item in poller:
            beat = work.heartbeat(item.id, environment_id=environment_id, expected_last_heartbeat=NO_HEARTBEAT)
            beats.append(asyncio.create_task(beat))
            if time.perf_counter() - began > longest_seconds:
                break
        replies = await asyncio.gather(*beats)
        took, used = time.perf_counter() - began, time.process_time() - cpu
    claimed = sum(reply.state == "active" for reply in replies)
    return {"items": claimed, "seconds": took, "cpu_ms": used * 1000 / claimed, "peak_mb": as_lambda.peak_mb()}


async def beats(rounds: float) -> dict[str, Any]:
    """Rounds of heartbeats of all leases given on standard input, 50 at once."""
    environment_id = os.environ["FLEET_ENVIRONMENT_ID"]
    leases: dict[str, str] = dict(json.load(sys.stdin))
    at_once, runs = asyncio.Semaphore(50), []
    async with client() as sdk:
        work = sdk.beta.environments.work

        async def beat(work_id: str) -> None:
            async with at_once:
                reply = await work.heartbeat(
                    work_id,
                    environment_id=environment_id,
                    expected_last_heartbeat=leases[work_id],
                    desired_ttl_seconds=300,
                )
            leases[work_id] = reply.last_heartbeat

        for _ in range(int(rounds)):
            began, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(beat(work_id) for work_id in leases))
            took, used = time.perf_counter() - began, time.process_time() - cpu
            runs.append({"beats": len(leases), "seconds": took, "cpu_ms": used * 1000 / len(leases)})
    return {"runs": runs, "peak_mb": as_lambda.peak_mb()}


async def work() -> dict[str, Any]:
    """Its worker, polling and serving until standard input ends."""
    environment_id, key = os.environ["FLEET_ENVIRONMENT_ID"], os.environ["ENVIRONMENT_KEY"]
    with tempfile.TemporaryDirectory() as workdir:
        async with client() as sdk:
            worker = sdk.beta.environments.work.worker(
                environment_id=environment_id, environment_key=key, workdir=workdir, max_idle=1.0
            )
            serving = asyncio.create_task(worker.run())
            await asyncio.to_thread(sys.stdin.read)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
    return {}


def main() -> None:
    sys.path.insert(0, str(as_lambda.SDK_SITE))
    what, *arguments = sys.argv[1:]
    sides: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]]
    sides = {"dispatch": dispatch, "beats": beats, "work": work}
    print(json.dumps(asyncio.run(sides[what](*map(float, arguments)))))
