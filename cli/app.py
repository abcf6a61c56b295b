"""The `fleet` command itself: its options, its groups of commands, its help, and how errors reach the operator."""

import sys
from typing import Annotated, Any

import typer
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError
from pydantic import ValidationError
from typer.core import TyperGroup

from cli import control, cost, doctor, exec, key, local, logs, show, stats, work
from cli.stack import DEFAULT_STACK, Fleet
from cli.terminal import Code, Failure, note
from shared.config import Missing
from shared.store import Conflict
from shared.work_api import NO_HEARTBEAT, WorkApiError

_VALUES = ("--stack", "--region", "--profile", "--endpoint-url")
_FLAGS = ("--json",)
_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException")

_HELP_END = """\
Options, before or after the command: --stack NAME (or FLEET_STACK)  --json
  --region NAME  --profile NAME  --endpoint-url URL (or AWS_ENDPOINT_URL)
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 not done, 5 timed out
Shell completion: fleet --install-completion.  More help: fleet ls --help
"""


class Commands(TyperGroup):
    """Help that fits one screen: the commands by group, a line each."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  typer calls it so
        formatter.write("Usage: fleet COMMAND [ARGS]...\n")
        formatter.write(f"{self.help}\n\n")
        width = max(len(name) for name in self.commands) + 2
        group = ""
        for name, command in self.commands.items():
            if command.hidden:
                continue
            if (panel := str(command.rich_help_panel)) != group:  # type: ignore[attr-defined]
                group = panel
                formatter.write(f"{group}:\n")
            formatter.write(f"  {name:{width}}{command.get_short_help_str(78 - width)}\n")
        formatter.write(f"\n{_HELP_END}")


app = typer.Typer(
    cls=Commands,
    help="See, stop, repair and account for the sessions of a sandbox-fleet stack.",
    rich_markup_mode=None,  # its boxes would be table art in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    ctx: typer.Context,
    stack: Annotated[str, typer.Option(envvar="FLEET_STACK", help="The stack's name.")] = DEFAULT_STACK,
    region: Annotated[str | None, typer.Option(help="AWS region; else the profile's or AWS_REGION.")] = None,
    profile: Annotated[str | None, typer.Option(help="AWS profile; else AWS_PROFILE.")] = None,
    endpoint_url: Annotated[
        str | None, typer.Option(envvar="AWS_ENDPOINT_URL", help="Where AWS answers: a local AWS's address.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sees to what every command shares."""
    ctx.obj = Fleet(stack, region, profile, endpoint_url, as_json)


def _add(group: str, command: Any, example: str, name: str | None = None) -> None:
    app.command(name, rich_help_panel=group, epilog=f"Example:  {example}")(command)


def _add_group(group: str, name: str, help: str, commands: dict[str, tuple[Any, str]]) -> None:
    """Commands below one word: `fleet NAME COMMAND`, each with its example's arguments."""
    below = typer.Typer(help=help, rich_markup_mode=None, no_args_is_help=True)
    for word, (command, arguments) in commands.items():
        below.command(word, epilog=f"Example:  fleet {name} {word} {arguments}".rstrip())(command)
    app.add_typer(below, name=name, rich_help_panel=group)


_add("Look", show.ls, "fleet ls --all")
_add("Look", show.show, "fleet show sesn_01ABC")
_add("Look", show.watch, "fleet watch")
_add("Look", logs.logs, "fleet logs sesn_01ABC -f")
_add("Look", stats.stats, "fleet stats")
_add("Look", cost.cost, "fleet cost --since 7d --plot cost.png")
_add("Look", doctor.doctor, "fleet doctor")
_add("One session", control.stop, "fleet stop sesn_01ABC --wait")
_add("One session", control.retry, "fleet retry sesn_01ABC")
_add("One session", exec.exec_, "fleet exec sesn_01ABC -- ps aux", "exec")
_add("All sessions", control.pause, "fleet pause")
_add("All sessions", control.resume, "fleet resume")
_add("All sessions", control.drain, "fleet drain --wait")
_add("All sessions", control.repair, "fleet repair")
_add("All sessions", control.redrive, "fleet redrive")
_add_group(
    "By hand",
    "local",
    "Run the stack on this machine, for development.",
    {
        "up": (local.up, ""),
        "down": (local.down, ""),
        "status": (local.status, ""),
        "queue": (local.queue, "--bash 'uname -a' --count 3"),
    },
)
_add_group("By hand", "key", "Rotate the environment key.", {"rotate": (key.rotate, "--file new-key.txt")})
_add_group(
    "By hand",
    "work",
    "Make one call of the Work API, for diagnosis.",
    {
        "get": (work.get, "work_01ABC"),
        "list": (work.list_, "--state active"),
        "stats": (work.stats, ""),
        "poll": (work.poll, ""),
        "ack": (work.ack, "work_01ABC"),
        "heartbeat": (work.heartbeat, f"work_01ABC --expected {NO_HEARTBEAT}"),
        "stop": (work.stop, "work_01ABC --force"),
        "update": (work.update, "work_01ABC --set owner=ana --delete note"),
    },
)


def global_options_first(arguments: list[str]) -> list[str]:
    """The options of all commands are taken before or after the command; what follows `--` is not ours."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word in _VALUES:
            first += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word in _FLAGS or word.startswith(tuple(f"{option}=" for option in _VALUES)):
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest, *arguments[end:]]


def explain(error: Exception) -> str:
    """One line for an error that no command foresaw: what failed, and what to do."""
    if isinstance(error, NoCredentialsError):
        return "There are no AWS credentials: sign in (aws sso login, aws configure) or choose --profile."
    if isinstance(error, NoRegionError):
        return "No AWS region is set: choose --region, or set AWS_REGION."
    if isinstance(error, ClientError):
        code, said = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
        if code in _DENIED:
            return f"AWS does not allow {error.operation_name}: {said} (docs/cli.md lists what `fleet` needs)."
        if code in _EXPIRED:
            return f"AWS does not take these credentials ({code}): sign in again or choose --profile."
        return f"AWS refused {error.operation_name} ({code}): {said}"
    if isinstance(error, BotoCoreError):
        return f"AWS was not reached: {error}. Check network, --region, --profile and --endpoint-url."
    if isinstance(error, Missing | Conflict | WorkApiError):
        return f"{error}"
    return f"Not read: {type(error).__name__}. Is the stack of the same version as this command?"


def main(arguments: list[str] | None = None) -> None:
    """The console script; ends by SystemExit. No error reaches the operator as a traceback."""
    try:
        app(global_options_first(sys.argv[1:] if arguments is None else arguments), prog_name="fleet")
    except Failure as failure:
        note(str(failure))
        sys.exit(failure.code)
    except (BotoCoreError, ClientError, Missing, Conflict, WorkApiError, ValidationError) as error:
        note(explain(error))
        sys.exit(Code.FAILED)
    except KeyboardInterrupt:
        sys.exit(Code.INTERRUPTED)


if __name__ == "__main__":
    main()
