"""The main job on a local stack: eight kinds of sessions, each seen through to its right end. `make demo` runs it."""

import argparse
import contextlib
import hashlib
import io
import json
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from boto3.dynamodb.types import TypeDeserializer
from botocore.exceptions import BotoCoreError, ClientError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from local.stack import Stack, StackFailed, running

POLL_SECONDS = 1.0
SLOTS = 8  # of --sessions: each sandbox is a process of its own
PARAMETERS = {
    "LeaseTtlSeconds": "45",
    "MaxIdleSeconds": "1",
    "StopTimeoutSeconds": "20",
    "PollWindowSeconds": "0",
    "Outputs": "on",
    "StagingBuckets": "demo-sources",
    "SizeClasses": "small:cpu=512:memory=1024:disk=30:image=2",
    "SandboxImage2": "sandbox:second",
}
SMALL = {"cpu": "512", "memory": "1024", "ephemeralStorage": {"sizeInGiB": 30}}  # as DescribeTasks shows it
ARCHIVE = "s3://demo-sources/team/src.zip"

Record = dict[str, Any]


def bash(command: str, expect: str) -> dict[str, Any]:
    """One step of the scripted agent: a tool call and what its result must contain."""
    return {"tool": "bash", "input": {"command": command}, "expect": expect}


QUICK = [bash("echo result-$((6*7))", "result-42")]
LONG = [bash("sleep 60", "")]
REPORT = [bash("mkdir outputs/charts; echo 42 > outputs/charts/a.txt; echo result-$((6*7))", "result-42")]
STAGED = [bash("cat src/note", "from the archive")]
DRAFT = [bash("echo draft > outputs/draft.txt; sleep 60", "")]

# What the log of a served session tells (docs/operations.md, "Logs"), and who must have spoken
STORY = {"received", "held", "launched", "sandbox runs", "ticket used", "container dead", "turn ended", "sandbox"}


@dataclass
class Case:
    """One session: how it starts, what happens to it, how it must end."""

    name: str
    outcome: str
    script: list[dict[str, Any]] = field(default_factory=lambda: QUICK)
    turns: int = 1
    act: Callable[["Demo", "Case", Record], bool] | None = None  # tried until it says that it is done
    work_id: str = ""
    acted: bool = False
    taken: bool = False  # another worker holds the lease
    attempts: int = 1
    metadata: dict[str, str] = field(default_factory=dict)
    small: bool = False  # whether it is to get the class that the stack lists
    outputs: dict[str, str] = field(default_factory=dict)  # what must be in the bucket afterwards

    def ended(self, record: Record | None) -> bool:
        done = len((record or {}).get("history", ())) + 1 == self.turns and self.acted
        return bool(record and record["phase"] == "stopped" and done)


def second_turn(demo: "Demo", case: Case, record: Record) -> bool:
    if record["phase"] != "stopped":
        return False
    demo.control("POST", f"sessions/{case.work_id}/messages", {"script": QUICK})
    return True


def graceful_stop(demo: "Demo", case: Case, _: Record) -> bool:
    return demo.mid_tool(case) and demo.control("POST", f"work/{case.work_id}/stop", {"force": False}) is not None


def forced_stop(demo: "Demo", case: Case, _: Record) -> bool:
    return demo.mid_tool(case) and demo.control("POST", f"work/{case.work_id}/stop", {"force": True}) is not None


def take_lease(demo: "Demo", case: Case, record: Record) -> bool:
    """Takes it mid-tool; ends the other's turn once ours is over, before that lease lapses and is offered again."""
    if not case.taken:
        case.taken = demo.mid_tool(case) and demo.control("POST", f"work/{case.work_id}/take_lease") is not None
        return False
    if record["phase"] != "stopped":
        return False
    return demo.control("POST", f"work/{case.work_id}/finish_foreign") is not None


def kill_sandbox(demo: "Demo", case: Case, _: Record) -> bool:
    if not demo.mid_tool(case):
        return False
    found = demo.sandboxes(case.work_id)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return bool(found)


def cases() -> list[Case]:
    return [
        Case("tool call verified", "completed", REPORT, outputs={"charts/a.txt": "42\n"}),
        Case("second turn, same id", "completed", turns=2, act=second_turn),
        Case("chooses its size", "completed", metadata={"sandbox-fleet.size": "small"}, small=True),
        Case("chooses a size that is not there", "completed", metadata={"sandbox-fleet.size": "huge"}),
        Case("starts from an archive", "completed", STAGED, metadata={"sandbox-fleet.archive": ARCHIVE}),
        *(Case(f"two at once ({n})", "completed") for n in range(1, 3)),
        Case("graceful stop mid-tool", "stopped", DRAFT, act=graceful_stop, outputs={"draft.txt": "draft\n"}),
        Case("forced stop mid-tool", "stopped", LONG, act=forced_stop),
        Case(
            "sandbox killed mid-turn",
            "completed",
            [*QUICK, bash("sleep 5; echo on", "on")],
            1,
            kill_sandbox,
            attempts=2,
        ),
        Case("healthcheck item", "no_sandbox", []),
        Case("lease taken by another", "lost", LONG, act=take_lease),
    ]


def many(count: int) -> list[Case]:
    """So many sessions at once, each a tool call: more than the slots, so that most wait in the server's queue."""
    return [Case(f"session {n}", "completed") for n in range(1, count + 1)]


class Demo:
    """One run over a deployed stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.cases: list[Case] = []
        self.http = httpx.Client(base_url=f"{stack.api_url}/_control/", timeout=10)
        self.dynamodb = stack.client("dynamodb")
        self.leases: dict[str, Record] = {}

    def put_archive(self) -> None:
        """What a session's metadata names, in a bucket that the stack's parameters list."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("src/note", "from the archive\n")
        bucket, key = ARCHIVE.removeprefix("s3://").split("/", 1)
        self.stack.client("s3").create_bucket(Bucket=bucket)
        self.stack.client("s3").put_object(Bucket=bucket, Key=key, Body=packed.getvalue())

    def control(self, method: str, path: str, body: Any = None) -> Any:
        """The emulator's control endpoint: what users and other workers do."""
        return self.http.request(method, path, json=body).raise_for_status().json()

    def queue(self, cases: list[Case]) -> None:
        self.cases += cases
        for case in cases:
            case.acted = case.act is None
            if case.script:
                session = {"script": case.script, "metadata": case.metadata}
                case.work_id = self.control("POST", "sessions", session)["sessions"][0]["work_id"]
            else:
                case.work_id = self.control("POST", "work", {"type": "healthcheck"})["work_id"]

    def records(self) -> dict[str, Record]:
        pages = self.dynamodb.get_paginator("scan").paginate(TableName=self.stack.outputs["TableName"])
        plain = TypeDeserializer().deserialize
        items = [{k: plain(v) for k, v in item.items()} for page in pages for item in page["Items"]]
        self.leases = {item["pk"]: item for item in items if item["sk"] == "lease"}
        return {item["pk"]: item for item in items if item["sk"] == "record"}

    def sandboxes(self, work_id: str | None = None) -> list[psutil.Process]:
        """The runner processes that live, by their tasks: a container's runtime id ends with its process's id."""
        found = []
        for task in self.tasks(self.stack.client("ecs")):
            (override,) = task["overrides"]["containerOverrides"]
            told = {pair["name"]: pair["value"] for pair in override["environment"]}
            if work_id is not None and told["FLEET_WORK_ID"] != work_id:
                continue
            for container in task["containers"]:
                with contextlib.suppress(psutil.Error, ValueError):
                    process = psutil.Process(int(container.get("runtimeId", "").rpartition("-")[2]))
                    if process.status() != psutil.STATUS_ZOMBIE and "runner" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def mid_tool(self, case: Case) -> bool:
        """Whether the session's last tool runs now: its runner has a child that sleeps."""
        sleeping = (child for process in self.sandboxes(case.work_id) for child in process.children(recursive=True))
        try:
            return any(child.name() == "sleep" for child in sleeping)
        except psutil.Error:
            return False

    def serve(self, timeout: float, show: Callable[[dict[str, Record]], None]) -> dict[str, Record]:
        """Until every case has ended and settled; raises TimeoutError naming who has not."""
        end = time.monotonic() + timeout
        while True:
            records = self.records()
            for case in self.cases:
                record = records.get(case.work_id)
                if record and not case.acted and case.act:
                    case.acted = case.act(self, case, record)
            show(records)
            waiting = [case for case in self.cases if not case.ended(records.get(case.work_id))]
            if not waiting and not self.sandboxes():
                return records
            if time.monotonic() > end:
                raise TimeoutError(
                    "; ".join(
                        f"{case.name} is {records.get(case.work_id, {}).get('phase', 'not polled')}" for case in waiting
                    )
                    or "sandboxes are left"
                )
            time.sleep(POLL_SECONDS)

    def counts(self, records: dict[str, Record]) -> str:
        """How many sessions are where; for more of them than a table can show."""
        states = [records.get(case.work_id, {}) for case in self.cases]
        found = Counter(str(state.get("outcome") or state.get("phase", "queued")) for state in states)
        return "  ".join(f"{state} {count}" for state, count in sorted(found.items()))

    def table(self, records: dict[str, Record]) -> Table:
        table = Table("session", "phase", "turn", "attempt", "lease age", "task", "ends as", box=SIMPLE_HEAD, padding=0)
        for case in self.cases:
            record, lease = records.get(case.work_id, {}), self.leases.get(case.work_id)
            live = record.get("phase") not in (None, "stopped") and lease
            age = f"{time.time() - int(lease['accepted_sent_at']) / 1000:.0f} s" if live and lease else ""
            table.add_row(
                case.name,
                record.get("outcome") or record.get("phase", "queued"),
                str(len(record.get("history", ())) + 1),
                str(record.get("attempt", "")),
                age,
                str(record.get("task_arn", "")).rsplit("/", 1)[-1][:8],
                case.outcome,
            )
        return table

    def faults(self, records: dict[str, Record]) -> list[str]:
        """Everything that ended otherwise than it must."""
        found = []
        state = self.control("GET", "state")
        sessions = {session["session_id"]: session for session in state["sessions"]}
        for case in self.cases:
            record = records[case.work_id]
            if record["outcome"] != case.outcome or record["attempt"] < case.attempts:
                found.append(
                    f"{case.name}: {record['outcome']} at attempt {record['attempt']}, must be {case.outcome} "
                    f"at {case.attempts} ({record.get('reason')})"
                )
            found += self.misput(case, record)
            for turn in record.get("history", ()):
                if turn["outcome"] != case.outcome:
                    found.append(f"{case.name}: its earlier turn ended {turn['outcome']}, must be {case.outcome}")
            links = record.get("links", {})
            if case.outcome == "completed" and self.is_whole(case) and links.keys() != {"task", "log", "loop"}:
                found.append(f"{case.name}: its record does not say where its sandbox is: {links}")
            session = sessions.get(case.work_id)
            if session and case.outcome == "completed":
                if session["mismatches"]:
                    found.append(f"{case.name}: wrong tool results {session['mismatches']}")
                if session["turns_finished"] != case.turns:
                    found.append(f"{case.name}: {session['turns_finished']} turns finished, must be {case.turns}")
            stops = [c for c in state["calls"] if c["call"] == "stop" and c["work_id"] == case.work_id]
            if case.outcome == "lost" and stops:
                found.append(f"{case.name}: a stop was posted after the lease was lost: {stops}")
        found += [
            f"{item['id']}: the API has it as {item['state']}" for item in state["work"] if item["state"] != "stopped"
        ]
        untold = [told for told in state["webhooks"] if told["status"] != 202]
        found += [f"a webhook was answered {told['status']}, must be 202" for told in untold]
        if not state["webhooks"]:
            found.append("no webhook was sent")
        logs = self.logs()
        return found + self.sizes() + self.dead_letters() + self.untold(logs) + self.leaks(logs)

    def is_whole(self, case: Case) -> bool:  # noqa: ARG002 - a run that deploys under its sessions has others
        """Whether this version served the session from its start; records and logs of an earlier one say less."""
        return True

    def sizes(self) -> list[str]:
        """Tasks of another machine or image than their session's metadata chose."""
        found, tasks = [], self.tasks(self.stack.client("ecs"))
        for case in self.cases:
            for task in (task for task in tasks if task["startedBy"].startswith(f"{case.work_id}/")):
                chosen = {name: task[name] for name in SMALL} == SMALL and "-sandbox-2:" in task["taskDefinitionArn"]
                if chosen != case.small:
                    found.append(f"{case.name}: its task has {task['cpu']} CPU units, {task['memory']} MiB")
        return found

    def misput(self, case: Case, record: Record) -> list[str]:
        """What is wrong with a session's outputs: as the record lists them, and in the bucket."""
        told = record.get("outputs", {})
        if (told.get("files", 0), told.get("problem")) != (len(case.outputs), None):
            return [f"{case.name}: {len(case.outputs)} outputs expected, the record says {told}"]
        if not told:
            return []
        s3, bucket = self.stack.client("s3"), self.stack.outputs["OutputsBucketName"]

        def content(key: str) -> bytes:
            body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            return body

        listed = json.loads(content(told["manifest"]))["files"]
        put = {one["name"]: content(one["key"]).decode() for one in listed}
        sums = {one["name"]: hashlib.sha256(put[one["name"]].encode()).hexdigest() for one in listed}
        if put != case.outputs or sums != {one["name"]: one["sha256"] for one in listed}:
            return [f"{case.name}: its outputs are {listed}, must be {case.outputs}"]
        return []

    def dead_letters(self) -> list[str]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        queue = self.stack.client("sqs").get_queue_attributes(
            QueueUrl=self.stack.outputs["DlqUrl"], AttributeNames=names
        )
        count = sum(int(queue["Attributes"][name]) for name in names)
        return [f"{count} messages are in the dead-letter queue"] if count else []

    def logs(self) -> dict[str, list[str]]:
        """The lines of every log group."""
        logs, lines = self.stack.client("logs"), dict[str, list[str]]()
        for page in logs.get_paginator("describe_log_groups").paginate():
            for group in page["logGroups"]:
                name = group["logGroupName"]
                pages = logs.get_paginator("filter_log_events").paginate(logGroupName=name)
                lines[name] = [line for p in pages for e in p["events"] for line in e["message"].splitlines()]
        return lines

    def untold(self, logs: dict[str, list[str]]) -> list[str]:
        """Moments of a served session that no line with its ids tells, over functions and sandbox."""
        told: dict[str, set[str]] = {case.work_id: set() for case in self.cases}
        for line in (line for lines in logs.values() for line in lines if line.startswith("{")):
            said = json.loads(line)
            if said.get("work_id") in told and "turn" in said:
                told[said["work_id"]] |= {str(said.get(key)) for key in ("message", "service")}
        served = [case for case in self.cases if case.outcome == "completed" and self.is_whole(case)]
        silent = {case.name: sorted(STORY - told[case.work_id]) for case in served if STORY - told[case.work_id]}
        return [f"{name}: no log line tells of {', '.join(moments)}" for name, moments in silent.items()]

    def leaks(self, logs: dict[str, list[str]]) -> list[str]:
        """Secret values in anything that an operator or ECS reader can see."""
        secrets = [*self.control("GET", "secrets")["secrets"], *self.stack.keys]
        places = {"DynamoDB": json.dumps(list(self.records().values()), default=str)}
        ecs, loops = (self.stack.client(name) for name in ("ecs", "stepfunctions"))
        places |= {f"log {name}": "\n".join(lines) for name, lines in logs.items()}
        places["ECS"] = json.dumps(self.tasks(ecs), default=str)
        machine = self.stack.outputs["StateMachineArn"]
        for execution in loops.list_executions(stateMachineArn=machine)["executions"]:
            pages = loops.get_paginator("get_execution_history").paginate(executionArn=execution["executionArn"])
            places[execution["name"]] = json.dumps([e for p in pages for e in p["events"]], default=str)
        places["output of our processes"] = "\n".join(self.stack.printed)
        kinds = ("DynamoDB", "log ", "ECS", "lease-loop")
        unread = [k for k in kinds if not any(text.strip("[]{} \n") for p, text in places.items() if p.startswith(k))]
        found = [f"the leak check found nothing to read in {kind.strip()}" for kind in unread]
        return found + [f"a secret is in {place}" for place, text in places.items() if any(s in text for s in secrets)]

    def tasks(self, ecs: Any) -> list[dict[str, Any]]:
        cluster = self.stack.outputs["ClusterArn"]
        pages = (
            page
            for status in ("RUNNING", "STOPPED")
            for page in ecs.get_paginator("list_tasks").paginate(cluster=cluster, desiredStatus=status)
        )
        arns = [arn for page in pages for arn in page["taskArns"]]
        batches = (arns[start : start + 100] for start in range(0, len(arns), 100))
        return [task for batch in batches for task in ecs.describe_tasks(cluster=cluster, tasks=batch)["tasks"]]

    def timelines(self, say: Callable[[str], None], records: dict[str, Record]) -> None:
        for case in self.cases:
            record = records.get(case.work_id)
            if record is None:
                continue
            say(f"\n{case.name}  {case.work_id}")
            for turn in [*record.get("history", ()), record]:
                start = int(turn["timeline"][0]["at"])
                for moment in turn["timeline"]:
                    say(f"  {(int(moment['at']) - start) / 1000:7.1f} s  {moment['event']}")


def run(options: argparse.Namespace, console: Console) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - began:5.1f} s] {text}", markup=False, highlight=False)

    crowd = options.sessions > 0
    parameters = PARAMETERS | {"MaxSessions": str(SLOTS)} if crowd else PARAMETERS
    with running(options.time_scale, say, parameters) as stack:
        demo = Demo(stack)
        demo.put_archive()
        demo.queue(many(options.sessions) if crowd else cases())
        say(f"{len(demo.cases)} sessions queued")
        seen: dict[str, str] = {}
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def show(records: dict[str, Record]) -> None:
                if crowd:
                    counts = demo.counts(records)
                    if seen.get("all") != counts:
                        seen["all"] = counts
                        say(counts)
                    return
                if console.is_terminal:
                    live.update(demo.table(records), refresh=True)
                    return
                for case in demo.cases:
                    phase = records.get(case.work_id, {}).get("phase", "queued")
                    if seen.get(case.name) != phase:
                        seen[case.name] = phase
                        say(f"{case.name}: {phase}")

            try:
                records, faults = demo.serve(options.timeout, show), []
            except TimeoutError as stuck:
                records, faults = demo.records(), [f"not done within {options.timeout:.0f} s: {stuck}"]
        if not crowd:
            demo.timelines(lambda line: console.print(line, markup=False, highlight=False), records)
            console.print(demo.table(records))
        faults = faults or demo.faults(records)
        outcomes = [record.get("outcome") for record in records.values()]
        stranded = sum(record["phase"] != "stopped" for record in records.values())
        stranded += sum(case.work_id not in records for case in demo.cases)
        left = sum(task["lastStatus"] != "STOPPED" for task in demo.tasks(stack.client("ecs")))
        left += len(demo.sandboxes())
    for fault in faults:
        console.print(f"demo failed: {fault}", markup=False, highlight=False)
    print(
        f"demo: sessions={len(demo.cases)} completed={outcomes.count('completed')} "
        f"stopped={outcomes.count('stopped') + outcomes.count('no_sandbox')} lost={outcomes.count('lost')} "
        f"failed={len(faults)} stranded={stranded} sandboxes_left={left} seconds={time.monotonic() - began:.0f}"
    )
    return 1 if faults or stranded or left else 0


def interrupt(*_: object) -> None:
    """The first signal ends the run; further ones must not cut the clean-up short."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--time-scale", type=float, default=0.05, help="speed of schedules: 0.05 makes a minute 3 s")
    parser.add_argument(
        "--sessions", type=int, default=0, help=f"serve so many plain sessions instead, {SLOTS} at once"
    )
    parser.add_argument("--timeout", type=float, default=180, help="seconds until what has not ended counts as failed")
    options = parser.parse_args()
    if not 0 < options.time_scale <= 1:
        parser.error("--time-scale must be over 0 and at most 1")
    if options.sessions < 0:
        parser.error("--sessions must be positive, or 0 for the twelve kinds")
    console = Console(stderr=True)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, interrupt)
    try:
        return run(options, console)
    except KeyboardInterrupt:
        console.print("interrupted: everything that was started has been ended")
        return 130
    except (StackFailed, httpx.HTTPError, BotoCoreError, ClientError) as failure:
        console.print(f"demo failed: {failure}", markup=False, highlight=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
