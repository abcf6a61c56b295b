"""The local AWS's command line and process live here; what it corrects of ministack is beside it."""

import argparse
import asyncio
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from local.aws import gate
from local.aws.containers import Images, ImagesFileError
from local.aws.processes import RUN_MARK
from local.aws.watchdog import Watchdog

HOST = "127.0.0.1"
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "USER", "LOGNAME", "PYTHONDONTWRITEBYTECODE")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def main() -> None:
    """Serve until told to stop (SIGTERM, SIGINT, SIGHUP); ends the process."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until serving, any signal just ends it: the watchdog sees to the rest
    options = _options()
    try:
        images = Images.from_file(options.images)
        listener = socket.create_server((HOST, options.port), backlog=1024)
    except ImagesFileError as error:
        sys.exit(f"local aws: {error}")
    except OSError as error:
        why = os.strerror(error.errno or 0)
        sys.exit(f"local aws: cannot listen on {HOST}:{options.port}: {why}; choose another --port")
    endpoint = f"http://{HOST}:{listener.getsockname()[1]}"
    run_id = uuid.uuid4().hex
    state, watchdog = _state_directory(options.state_dir, run_id)
    _prepare_environment(options, listener.getsockname()[1], state, run_id)
    # Only now: ministack reads the environment when it is imported.
    from local.aws import iam, patches  # noqa: PLC0415
    from local.aws.ecs import TaskEngine  # noqa: PLC0415

    patches.exception_names()
    patches.schedules(options.time_scale)
    patches.callable_function_urls(endpoint)
    patches.as_if_over_tls()
    patches.yaml_definitions()
    patches.recorded_only_types()
    patches.builds_push_an_image()
    patches.asynchronous_invocations()
    patches.packages_unpacked_once(state / "tmp" / "packages")
    patches.few_workers(options.workers)
    iam.install()
    TaskEngine(images, state / "tasks", state / "logs", state / "sessions", run_id).install()
    try:
        asyncio.run(_serve(listener, endpoint, watchdog, options.stop_at_stdin_eof))
    finally:  # it comes here only by an error
        traceback.print_exc()
        watchdog.clean_up()
        os._exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m local.aws",
        description="An AWS on this machine: ministack, bound to 127.0.0.1, state in memory, IAM enforced. "
        "Prints 'local aws ready on http://127.0.0.1:PORT' when ready; all it started is gone when it ends. "
        f"With {gate.ROOT_KEY} and {gate.ROOT_SECRET} set, it takes no other root credential than that.",
    )
    parser.add_argument("--port", type=int, default=4566, help="port to listen on; 0 picks a free one")
    parser.add_argument(
        "--time-scale", type=_factor, default=1.0, help="factor on rate() schedules (0.1: ten times faster)"
    )
    parser.add_argument("--sfn-wait-scale", type=_factor, default=1.0, help="factor on the waits of Step Functions")
    parser.add_argument("--workers", type=int, default=3, help="workers of one Lambda function at most; others wait")
    parser.add_argument("--images", type=Path, help='JSON file {"image": ["program", "argument"]}: what ECS tasks run')
    parser.add_argument(
        "--state-dir", type=Path, help="where its files go; kept (default: a directory removed at the end)"
    )
    parser.add_argument(
        "--stop-at-stdin-eof",
        action="store_true",
        help="stop when standard input ends, as when the parent dies",
    )
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error("--port must be between 0 and 65535")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1000")
    return value


def _state_directory(given: Path | None, run_id: str) -> tuple[Path, Watchdog]:
    """The state directory, and the watchdog that removes it (of a given one: the temporary parts)."""
    if given is None:
        state = Path(tempfile.mkdtemp(prefix="local-aws-"))
        return state, Watchdog(run_id, state / "sessions", [state])
    state = given.resolve()
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"local aws: cannot make the state directory {state}: {error.strerror}")
    return state, Watchdog(run_id, state / "sessions", [state / "tasks", state / "tmp"])


def _prepare_environment(options: argparse.Namespace, port: int, state: Path, run_id: str) -> None:
    """Give this process, and so each Lambda worker, an environment without secrets of the user's."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    if gate.ROOT_KEY in os.environ:
        names = {gate.ROOT_KEY: "AWS_ACCESS_KEY_ID", gate.ROOT_SECRET: "AWS_SECRET_ACCESS_KEY"}
        kept |= {meant: os.environ[given] for given, meant in names.items()}
    temporary = state / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ.clear()
    os.environ.update(
        kept,
        **{RUN_MARK: run_id},
        AUTH="true",
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        BIND_HOST=HOST,
        DOCKER_HOST=f"unix://{state}/no-docker",
        GATEWAY_PORT=str(port),
        IOT_MTLS_ENABLED="0",
        LOG_LEVEL=options.log_level,
        MINISTACK_HOST=HOST,
        PERSIST_STATE="0",
        S3_DATA_DIR=str(state / "s3"),
        SFN_WAIT_SCALE=str(options.sfn_wait_scale),
        SFTP_ENABLED="0",
        STATE_DIR=str(state / "ministack"),
        TMPDIR=str(temporary),
    )
    tempfile.tempdir = None  # asked for before TMPDIR was set


async def _serve(listener: socket.socket, endpoint: str, watchdog: Watchdog, stop_at_stdin_eof: bool) -> None:
    from hypercorn.asyncio import serve  # noqa: PLC0415
    from hypercorn.config import Config  # noqa: PLC0415
    from ministack.app import app  # noqa: PLC0415

    served = gate.guarded(app) if "AWS_ACCESS_KEY_ID" in os.environ else app

    async def announcing(scope: Message, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                print(f"local aws ready on {endpoint}", flush=True)

        await served(scope, receive, sent if scope["type"] == "lifespan" else send)

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signum, stop.set)
    if stop_at_stdin_eof:

        def wait_for_eof() -> None:
            sys.stdin.buffer.read()
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait_for_eof, daemon=True, name="stdin").start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > soft else soft, hard))
    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    config.keep_alive_timeout = 75
    config.loglevel = os.environ["LOG_LEVEL"]
    serving = asyncio.create_task(serve(announcing, config, shutdown_trigger=asyncio.Event().wait))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()  # raises what ended it
    watchdog.clean_up()
    os._exit(0)  # nothing to save; a Lambda call in flight must not hold up the end


if __name__ == "__main__":
    main()
