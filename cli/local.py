"""`fleet local`: the local stack kept running for development, and the user's real environment served from here."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cli.key import read_key
from cli.stack import Fleet
from cli.terminal import Code, Failure, clock, note, print_json, say, working
from local import kept
from local.kept import ROOT, Kept

_START_SECONDS = 600.0  # a first start builds the template
_END_SECONDS = 120.0
_LAST_LINES = 6


def up(
    ctx: typer.Context,
    real: Annotated[
        bool, typer.Option("--real", help="Serve an environment of the vendor's; its key is asked for.")
    ] = False,
    environment_id: Annotated[str | None, typer.Option(help="With --real: the environment's id.")] = None,
    base_url: Annotated[str, typer.Option(help="With --real: the API.")] = "https://api.anthropic.com",
    key_file: Annotated[Path | None, typer.Option(help="With --real: a file that holds the environment key.")] = None,
    time_scale: Annotated[float, typer.Option(help="Speed of schedules: 0.05 makes a minute 3 s.")] = 1.0,
) -> None:
    """Start the local stack: local AWS, the real template, sandboxes as processes; it stays until `fleet local down`.

    Without --real our emulator of the Work API is the far side, and `fleet local queue` makes sessions. With --real the
    agent's own code runs on this machine, so it starts only where bubblewrap can shut it in.
    """
    fleet: Fleet = ctx.obj
    if kept.starting_or_running():
        raise Failure("A local stack runs already: see `fleet local status`, end it with `fleet local down`.")
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        raise Failure(f"The local stack's environments are not there: run `make setup` in {ROOT}.")
    command = [str(python), "-m", "local.kept", "--time-scale", str(time_scale)]
    given = ""
    if real:
        if not environment_id:
            raise Failure("--real needs --environment-id.", Code.USAGE)
        given = read_key(key_file).get_secret_value()
        command += ["--environment-id", environment_id, "--base-url", base_url]
    started = _start(command, given)
    _show(fleet, started)


def down(ctx: typer.Context) -> None:
    """End the local stack; sandboxes, their files and all sessions of the emulator are gone with it."""
    fleet: Fleet = ctx.obj
    found = _found()
    os.kill(found.pid, signal.SIGTERM)
    with working("waiting for the local stack to end"):
        end = time.monotonic() + _END_SECONDS
        while kept.starting_or_running():
            if time.monotonic() > end:
                raise Failure(f"It has not ended after {_END_SECONDS:.0f} s (process {found.pid}).", Code.TIMED_OUT)
            time.sleep(0.2)
    if fleet.json:
        print_json({"ended": True})
    else:
        say("The local stack has ended.")


def status(ctx: typer.Context) -> None:
    """Say where the local stack answers and what its queue holds."""
    _show(ctx.obj, _found())


def queue(
    ctx: typer.Context,
    bash: Annotated[
        list[str], typer.Option("--bash", metavar="COMMAND", help="What the agent runs; may be repeated.")
    ] = ["echo hello"],  # noqa: B006 - typer copies it
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many sessions.")] = 1,
) -> None:
    """Make sessions at the emulator, whose agent runs the given commands; prints the work items' ids."""
    fleet: Fleet = ctx.obj
    found = _found()
    if found.real:
        raise Failure("This stack serves the vendor's API: make sessions there.", Code.NOT_DONE)
    script = [{"tool": "bash", "input": {"command": command}, "expect": ""} for command in bash]
    made = _control(found, "POST", "sessions", {"script": script, "count": count})["sessions"]
    if fleet.json:
        print_json(made)
        return
    for session in made:
        say(session["work_id"])


def _found() -> Kept:
    """Raises Failure where none is ready."""
    found = kept.find()
    if found is None:
        state = "is not ready yet" if kept.starting_or_running() else "does not run: `fleet local up` starts it"
        raise Failure(f"The local stack {state}.", Code.NOT_DONE)
    return found


def _start(command: list[str], given: str) -> Kept:
    """Starts it, showing its progress. Raises Failure with its last lines if it ends instead; Ctrl-C ends it."""
    kept.LOG.parent.mkdir(exist_ok=True)
    with kept.LOG.open("w") as log, kept.LOG.open() as told:
        process = subprocess.Popen(  # noqa: S603 - this checkout's own Python and module
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
        )
        if process.stdin:  # neither the command line nor the environment is the key's place
            process.stdin.write(f"{given}\n")
            process.stdin.close()
        end = time.monotonic() + _START_SECONDS
        try:
            while time.monotonic() < end:
                for line in told:
                    note(line.rstrip())
                if found := kept.find():
                    return found
                if process.poll() is not None:
                    lines = kept.LOG.read_text().strip().splitlines()[-_LAST_LINES:]
                    raise Failure("The local stack did not start:\n  " + "\n  ".join(lines))
                time.sleep(0.2)
        except KeyboardInterrupt:
            note("ending what was started")
            process.terminate()
            process.wait(_END_SECONDS)
            raise
        process.terminate()
        raise Failure(f"The local stack was not ready after {_START_SECONDS:.0f} s: see {kept.LOG}.", Code.TIMED_OUT)


def _show(fleet: Fleet, found: Kept) -> None:
    shown: dict[str, Any] = {
        "environment_id": found.environment_id,
        "api_url": found.api_url,
        "aws_url": found.aws_url,
        "real": found.real,
        "running_since": clock(found.started_at * 1000),
        "log": str(kept.LOG),
    }
    if not found.real:
        states = [item["state"] for item in _control(found, "GET", "state")["work"]]
        shown["items"] = {state: states.count(state) for state in sorted(set(states))}
    if fleet.json:
        print_json(shown)
        return
    say(f"Work API    {found.api_url}{'' if found.real else ' (emulator)'}, environment {found.environment_id}")
    say(f"local AWS   {found.aws_url}, since {shown['running_since']}")
    if not found.real:
        say(f"items       {', '.join(f'{count} {state}' for state, count in shown['items'].items()) or 'none'}")
    say(f"log         {kept.LOG}")
    say(f"\nUse it:     export AWS_ENDPOINT_URL={found.aws_url}")
    say("            fleet watch" if found.real else "            fleet local queue --bash 'uname -a'; fleet watch")


def _control(found: Kept, method: str, path: str, body: Any = None) -> Any:
    try:
        reply = httpx.request(method, f"{found.api_url}/_control/{path}", json=body, timeout=30)
        return reply.raise_for_status().json()
    except httpx.HTTPError as error:
        raise Failure(f"The emulator does not answer ({type(error).__name__}): see {kept.LOG}.") from None
