"""Starts the emulator from the command line: arguments, keys, the ready line and the exit; nothing else."""

import argparse
import asyncio
import os
import secrets
import signal
import sys

from local.work_api.server import Emulator, Server
from local.work_api.switches import Switches, described


def main() -> int:
    """Serve until SIGTERM or SIGINT. The keys come from the environment, and are never printed."""
    parser = argparse.ArgumentParser(
        prog="python -m local.work_api",
        description="Work API emulator",
        epilog=f"switches, each one's default first:\n{described()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 picks a free one")
    parser.add_argument("--environment-id", required=True, help="the one environment it serves, env_...")
    parser.add_argument("--switch", action="append", default=[], metavar="name=value", help="set one of those below")
    arguments = parser.parse_args()
    try:
        switches = Switches().changed(dict(given.partition("=")[::2] for given in arguments.switch))
    except ValueError as error:
        parser.error(str(error))
    environment_key = os.environ.get("ANTHROPIC_ENVIRONMENT_KEY") or f"sk-ant-oat01-{secrets.token_urlsafe(32)}"
    org_key = os.environ.get("ANTHROPIC_API_KEY") or f"sk-ant-api03-{secrets.token_urlsafe(32)}"
    emulator = Emulator(arguments.environment_id, environment_key, org_key, switches)
    return asyncio.run(_serve(emulator, arguments.host, arguments.port))


async def _serve(emulator: Emulator, host: str, port: int) -> int:
    server = Server(emulator, host, port)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)

    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        print(f"work api emulator ready on {server.url}", flush=True)

    announcing = asyncio.create_task(announce())
    try:
        await server.serve()
    finally:
        announcing.cancel()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
