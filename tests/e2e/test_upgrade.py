"""The present version deployed over the previous one while sessions run, on the local stack."""

import tarfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from local import demo
from local.demo import PARAMETERS, QUICK, Case, Demo, Record, bash
from local.stack import IMAGES, Stack, build, started

SOURCE = Path(__file__).resolve().parents[1] / "contract" / "fixtures" / "previous" / "source.tar.gz"
NETWORK = {"SubnetIds": "subnet-00000000000000001", "SecurityGroupIds": "sg-00000000000000001"}
PREVIOUS = PARAMETERS | NETWORK | {"SandboxImage": "previous:local"}
# Beats often, so that rounds of the present loop are soon seen
PRESENT = PARAMETERS | NETWORK | {"NetworkMode": "existing", "BeatIntervalSeconds": "5"}
FEW_ROUNDS = 2
Act = Callable[[Demo, Case, Record], bool]


class Upgrade(Demo):
    """Sessions at work under the previous version; `step` deploys the present one under them."""

    def __init__(self, stack: Stack, hold: Path, deploy: Callable[[], Future[None]]) -> None:
        super().__init__(stack)
        self.hold, self.deploy = hold, deploy
        self.deploying: Future[None] | None = None
        self.deployed = False
        self.loops = stack.client("stepfunctions")
        held = bash(f"while [ -e {hold} ]; do sleep 1; done; echo on", "on")
        self.goes_on_after = Case("ends before, goes on after", "completed", turns=2, act=self.after(demo.second_turn))
        self.killed_after = Case("killed after", "completed", [held], act=self.after(demo.kill_sandbox), attempts=2)
        self.at_work = [
            Case("works through", "completed", [held, *QUICK]),
            Case("killed meanwhile", "completed", [held], act=self.meanwhile(demo.kill_sandbox), attempts=2),
            self.killed_after,
            Case("graceful stop after", "stopped", [held], act=self.after(demo.graceful_stop)),
        ]
        self.queue([self.goes_on_after, *self.at_work])
        self.to_arrive = [Case(f"arrives meanwhile ({n})", "completed") for n in (1, 2)]
        self.arrives_after = Case("arrives after", "completed")

    def meanwhile(self, act: Act) -> Act:
        return lambda of, case, record: self.deploying is not None and act(of, case, record)

    def after(self, act: Act) -> Act:
        return lambda of, case, record: self.deployed and act(of, case, record)

    def step(self, records: dict[str, Record]) -> None:
        """Deploys once all are at work; lets work arrive meanwhile and after; ends what it held under the new loop."""
        if self.deploying is None:
            ended = records.get(self.goes_on_after.work_id, {}).get("phase") == "stopped"
            if ended and all(self.mid_tool(case) for case in self.at_work):
                self.deploying = self.deploy()
        elif not self.deployed:
            if self.to_arrive:
                self.queue([self.to_arrive.pop()])
            if self.deploying.done():
                self.deploying.result()
                self.deployed = True
                self.queue([*self.to_arrive, self.arrives_after])
        elif self.hold.exists() and any(states.count("Beat") > FEW_ROUNDS for states in self.executions()):
            self.hold.unlink()

    def is_whole(self, case: Case) -> bool:
        return case is self.arrives_after

    def executions(self) -> list[list[str]]:
        """The states that each execution of the lease loop entered, the oldest first."""
        found = self.loops.list_executions(stateMachineArn=self.stack.outputs["StateMachineArn"])["executions"]
        return [self.entered(each["executionArn"]) for each in sorted(found, key=lambda each: each["startDate"])]

    def entered(self, execution: str) -> list[str]:
        pages = self.loops.get_paginator("get_execution_history").paginate(executionArn=execution)
        events = (event for page in pages for event in page["events"])
        return [e["stateEnteredEventDetails"]["name"] for e in events if "stateEnteredEventDetails" in e]

    def images(self, case: Case) -> list[str]:
        """What the session's sandboxes ran, the oldest first."""
        tasks = sorted(self.tasks(self.stack.client("ecs")), key=lambda task: task["createdAt"])
        return [task["containers"][0]["image"] for task in tasks if task["startedBy"].startswith(case.work_id)]


def unpack(folder: Path) -> Path:
    """The previous version; its loop hands over after a few rounds instead of 850, so within the test."""
    with tarfile.open(SOURCE) as archive:
        archive.extractall(folder, filter="data")
    loop = folder / "statemachine" / "lease_loop.asl.yaml"
    text = loop.read_text()
    assert text.count("Equals: 850") == 3
    loop.write_text(text.replace("Equals: 850", f"Equals: {FEW_ROUNDS}"))
    return folder


def test_a_deploy_while_sessions_run_loses_none(tmp_path: Path) -> None:
    previous, hold = unpack(tmp_path / "previous"), tmp_path / "hold"
    hold.touch()
    images = IMAGES | {"previous": previous / "sandbox"}
    build(tmp_path, print)  # here, so that the deploy takes no longer than it must
    with started(0.05, print, images) as stack, ThreadPoolExecutor(1) as pool:
        stack.deploy(print, PREVIOUS, previous)
        kept = {name: value for name, value in stack.outputs.items() if name != "TaskDefinitionArn"}
        run = Upgrade(stack, hold, lambda: pool.submit(stack.deploy, print, PRESENT))
        try:
            records = run.serve(240, run.step)
        finally:
            run.timelines(print, run.records())
        assert run.faults(records) == []
        assert kept.items() <= stack.outputs.items(), "table, queues, loop and secret are the same ones"
        assert [t["taskArn"] for t in run.tasks(stack.client("ecs")) if t["lastStatus"] != "STOPPED"] == []
        served = {case.name: run.images(case) for case in (run.goes_on_after, run.killed_after, run.arrives_after)}
        both = ["previous:local", "sandbox:local"]
        assert served == {run.goes_on_after.name: both, run.killed_after.name: both, "arrives after": both[1:]}
        *_, before, last = (states for states in run.executions())
        assert before[-2:] == ["HandOver", "Done"]
        assert "HandOver" not in last
