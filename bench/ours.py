"""Our side of a measurement, in a process of its own: the real functions as Lambda has them (as_lambda.py).

`measuring.side("ours", ...)` starts it; the last line printed is the answer, what comes before is the function's log.
"""

import json
import sys
import time
from typing import Any

from bench import as_lambda


def dispatch() -> dict[str, Any]:
    """One poller run until the queue is empty: poll, persist, ack, claim, persist, enqueue."""
    claimer = as_lambda.load("poller").claimer()
    claimer.key()
    began, cpu = time.perf_counter(), time.process_time()
    held = claimer.run("bench", int(time.time() * 1000) + 280_000)
    took, used = time.perf_counter() - began, time.process_time() - cpu
    return {"items": held, "seconds": took, "cpu_ms": used * 1000 / held, "peak_mb": as_lambda.peak_mb()}


def main() -> None:
    as_lambda.surround()
    what, *arguments = sys.argv[1:]
    print(json.dumps({"dispatch": dispatch}[what](*arguments)))
