"""The emulator's own ceiling: a bare client that does almost nothing, many calls at once, in a process of its own."""

import asyncio
import json
import os
import sys
import time
from typing import Any
from urllib.parse import urlsplit

AT_ONCE = 192  # more than either side, so that the round trip is not the limit


class Connection:
    """One kept-alive HTTP/1.1 connection, reading only what it needs."""

    def __init__(self) -> None:
        url = urlsplit(os.environ["FLEET_BASE_URL"])
        self._address = url.hostname, url.port
        self._root = f"/v1/environments/{os.environ['FLEET_ENVIRONMENT_ID']}/work"
        self._headers = (
            f"HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {os.environ['ENVIRONMENT_KEY']}\r\n"
            "anthropic-beta: managed-agents-2026-04-01\r\ncontent-length: 0\r\n\r\n"
        )

    async def open(self) -> "Connection":
        self._read, self._write = await asyncio.open_connection(*self._address)
        return self

    async def call(self, method: str, path: str) -> Any:
        self._write.write(f"{method} {self._root}{path} {self._headers}".encode())
        head = (await self._read.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await self._read.readexactly(length))
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{method} {path}: {body}")
        return body


async def dispatch() -> dict[str, Any]:
    """Poll, ack and claim until the queue is empty; also gives the leases: work id and value."""

    async def drain() -> list[list[str]]:
        connection, leases = await Connection().open(), []
        while item := await connection.call("GET", "/poll"):
            await connection.call("POST", f"/{item['id']}/ack")
            beat = await connection.call("POST", f"/{item['id']}/heartbeat?expected_last_heartbeat=NO_HEARTBEAT")
            leases.append([item["id"], beat["last_heartbeat"]])
        return leases

    began = time.perf_counter()
    drained = await asyncio.gather(*(drain() for _ in range(AT_ONCE)))
    leases = [lease for each in drained for lease in each]
    return {"items": len(leases), "seconds": time.perf_counter() - began, "leases": leases}


async def beats() -> dict[str, Any]:
    """One round of heartbeats of all leases given on standard input."""
    waiting: list[list[str]] = json.load(sys.stdin)
    count, began = len(waiting), time.perf_counter()

    async def work() -> None:
        connection = await Connection().open()
        while waiting:
            work_id, value = waiting.pop()
            await connection.call("POST", f"/{work_id}/heartbeat?expected_last_heartbeat={value}")

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    took = time.perf_counter() - began
    return {"runs": [{"beats": count, "seconds": took, "cpu_ms": 0.0}], "peak_mb": 0.0}


def main() -> None:
    print(json.dumps(asyncio.run({"dispatch": dispatch, "beats": beats}[sys.argv[1]]())))
