"""Starts the local stack and deploys the real template to it; ends all of it. No scenarios (demo.py)."""

import base64
import contextlib
import hashlib
import json
import os
import platform
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx

from local import isolated
from local.aws.gate import ROOT_KEY, ROOT_SECRET
from local.aws.recorded import RECORDED_ONLY

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT_ID = "env_demo"
STACK = "sandbox-fleet"
IMAGES = {"sandbox": ROOT / "sandbox"}  # what SandboxImage may name, each with the folder of its runner
_READY_SECONDS = 60.0
_DEPLOY_SECONDS = 300.0
_END_SECONDS = 90.0  # the local AWS ends its children before itself; cut short, they still write as we clean up
_BUILT = ".aws-sam/local"  # apart from what `sam build` makes for AWS: that is for another Python
_SOURCES = ("template.yaml", "functions", "sandbox", "shared", "statemachine")


class StackFailed(Exception):
    """The stack could not be started or deployed; the message says why and what to do."""


@dataclass(frozen=True)
class Root:
    """The local AWS's root credential."""

    key_id: str = "test"
    secret: str = field(default="test", repr=False)

    def variables(self) -> dict[str, str]:
        """As the AWS SDKs take them."""
        return {
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


TEST = Root()


@dataclass(frozen=True)
class Real:
    """An environment of the vendor's, served instead of the emulator's."""

    environment_id: str
    base_url: str
    key: str = field(repr=False)


@dataclass
class Stack:
    """The local stack: where its parts answer, what is deployed, and what they printed."""

    folder: Path
    api_url: str
    aws_url: str
    keys: tuple[str, ...] = field(repr=False)  # the environment key, the organisation key, the webhook's signing key
    printed: list[str] = field(repr=False)
    outputs: dict[str, str] = field(default_factory=dict)
    environment_id: str = ENVIRONMENT_ID
    root: Root = TEST
    emulated: bool = True

    def client(self, service: str) -> Any:
        """A boto3 client of the local AWS."""
        return boto3.client(service, endpoint_url=self.aws_url, **_credentials(self.root))  # type: ignore[call-overload]

    def deploy(self, say: Callable[[str], None], parameters: dict[str, str], source: Path = ROOT) -> None:
        """A version of the project, over the one that is deployed; secrets are filled when they are new."""
        if build(self.folder, say, source):
            say("template built by sam build")
        given = {"EnvironmentId": self.environment_id, "BaseUrl": self.api_url, "SandboxImage": "sandbox:local"}
        before = self.outputs
        self.outputs = deploy(self.folder, self.aws_url, given | parameters, say, source, self.root)
        key, _, webhook_key = self.keys
        for name, value in (("EnvironmentKeySecretArn", key), ("WebhookSecretArn", webhook_key)):
            if value and name in self.outputs.keys() - before.keys():
                self.client("secretsmanager").put_secret_value(SecretId=self.outputs[name], SecretString=value)
        if self.emulated and (url := self.outputs.get("WebhookUrl")):
            webhook = {"url": url, "key": webhook_key}
            httpx.post(f"{self.api_url}/_control/webhook", json=webhook, timeout=10).raise_for_status()


def _credentials(root: Root) -> dict[str, str]:
    return {"aws_access_key_id": root.key_id, "aws_secret_access_key": root.secret, "region_name": "us-east-1"}


@contextlib.contextmanager
def running(
    time_scale: float, say: Callable[[str], None], parameters: dict[str, str], real: Real | None = None
) -> Iterator[Stack]:
    """The local stack with the template deployed; `real` is served instead of the emulator if given."""
    with started(time_scale, say) if real is None else serving(real, time_scale, say) as stack:
        stack.deploy(say, parameters)
        yield stack


@contextlib.contextmanager
def serving(real: Real, time_scale: float, say: Callable[[str], None]) -> Iterator[Stack]:
    """A local AWS for the vendor's environment: its root credential is this run's own, its sandboxes are shut in.

    Raises StackFailed where they cannot be.
    """
    try:
        images = {"sandbox": isolated.sandbox_image()}
    except isolated.CannotIsolate as why:
        raise StackFailed(f"{why}. An agent's own code is not run on this machine without it.") from None
    root, printed = Root(f"AKIA{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)), list[str]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-fleet-")))
        aws_url = stack.enter_context(local_aws(folder, printed, time_scale, images, root))
        say(f"local AWS on {aws_url}; sandboxes are shut in by bubblewrap")
        keys = (real.key, "", "")
        yield Stack(folder, real.base_url, aws_url, keys, printed, {}, real.environment_id, root, emulated=False)


@contextlib.contextmanager
def started(time_scale: float, say: Callable[[str], None], runners: Mapping[str, Path] = IMAGES) -> Iterator[Stack]:
    """The emulator and the local AWS, nothing deployed yet; all processes are gone at the end."""
    key, printed = f"sk-ant-oat01-{secrets.token_urlsafe(24)}", list[str]()
    organisation_key = f"sk-ant-api03-{secrets.token_urlsafe(24)}"
    webhook_key = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-fleet-")))
        api_url = stack.enter_context(work_api(key, organisation_key, printed))
        say(f"Work API emulator on {api_url}")
        images = {name: _sandbox_process(runner) for name, runner in runners.items()}
        aws_url = stack.enter_context(local_aws(folder, printed, time_scale, images))
        say(f"local AWS on {aws_url}")
        yield Stack(folder, api_url, aws_url, (key, organisation_key, webhook_key), printed)


@contextlib.contextmanager
def work_api(environment_key: str, organisation_key: str, printed: list[str]) -> Iterator[str]:
    """An emulator of the Work API with one environment, `ENVIRONMENT_ID`; yields its address."""
    argv = [sys.executable, "-m", "local.work_api", "--port", "0", "--environment-id", ENVIRONMENT_ID]
    keys = {"ANTHROPIC_ENVIRONMENT_KEY": environment_key, "ANTHROPIC_API_KEY": organisation_key}
    with _child(argv, "work api emulator ready on ", printed, **keys) as url:
        yield url


@contextlib.contextmanager
def local_aws(
    folder: Path,
    printed: list[str],
    time_scale: float,
    images: Mapping[str, dict[str, Any]] | None = None,
    root: Root = TEST,
) -> Iterator[str]:
    """A local AWS with its files in `folder`; yields its address."""
    listed = folder / "images.json"
    listed.write_text(json.dumps(images or {}))
    argv = [
        str(ROOT / ".venv-aws/bin/python"),
        *("-m", "local.aws", "--port", "0", "--time-scale", str(time_scale), "--stop-at-stdin-eof"),
        *("--images", str(listed), "--state-dir", str(folder / "aws"), "--log-level", "ERROR"),
    ]
    own = {} if root == TEST else {ROOT_KEY: root.key_id, ROOT_SECRET: root.secret}
    with _child(argv, "local aws ready on ", printed, **own) as url:
        yield url


def _sandbox_process(runner: Path) -> dict[str, Any]:
    """What a sandbox is here: the same runner in a process, with the task's scratch folder as its workspace.

    Outputs are a folder in it.
    """
    start = (
        "import os, runpy; here = os.environ['FLEET_WORKDIR'] = os.getcwd(); os.mkdir('outputs'); "
        "os.environ['FLEET_OUTPUTS'] = os.path.join(here, 'outputs'); runpy.run_module('runner', run_name='__main__')"
    )
    python = str(ROOT / ".venv-sandbox/bin/python")
    return {"argv": [python, "-P", "-c", start], "env": {"PYTHONPATH": str(runner)}}


@contextlib.contextmanager
def _child(argv: list[str], ready: str, printed: list[str], **environment: str) -> Iterator[str]:
    """A child process that said where it listens; what it prints is kept."""
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches us alone; we end it in order
    )
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            printed.append(line.rstrip())
            if line.startswith(ready):
                said.put(line[len(ready) :].strip())
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        try:
            address = said.get(timeout=_READY_SECONDS)
        except queue.Empty:
            address = None
        if address is None:
            last = printed[-1] if printed else "it printed nothing"
            raise StackFailed(f"{' '.join(argv[1:4])} did not start: {last}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def build(folder: Path, say: Callable[[str], None], source: Path = ROOT) -> bool:
    """`sam build` of the project in `source`, unless its parts are those of the last build."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = source / name
        for part in sorted([path] if path.is_file() else path.rglob("*")):
            if part.is_file() and "__pycache__" not in part.parts:
                digest.update(part.relative_to(source).as_posix().encode() + part.read_bytes())
    built = source / _BUILT
    mark = built / "sources"
    if mark.exists() and mark.read_text() == digest.hexdigest():
        return False
    say("building the template")
    version = _sam_python()
    _sam(
        folder,
        *("build", "--template-file", str(source / "template.yaml"), "--build-dir", str(built)),
        LAYER_PYTHON=version,
        LAYER_MACHINE=platform.machine().replace("arm64", "aarch64"),
    )
    mark.write_text(digest.hexdigest())
    return True


def _sam_python() -> str:
    """The Python that the local AWS runs functions with, whatever their Runtime says."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.check_output([ROOT / ".venv-aws/bin/python", "-c", code], text=True).strip()


def deploy(
    folder: Path,
    aws_url: str,
    parameters: dict[str, str],
    say: Callable[[str], None],
    source: Path = ROOT,
    root: Root = TEST,
) -> dict[str, str]:
    """`sam deploy` of what was built; the stack's outputs. Raises StackFailed, with CloudFormation's reason."""
    _sam(
        folder,
        *("deploy", "--template-file", str(source / _BUILT / "template.yaml"), "--stack-name", STACK, "--resolve-s3"),
        *("--capabilities", "CAPABILITY_IAM", "--no-confirm-changeset", "--no-progressbar", "--parameter-overrides"),
        *(f"{parameter}={value}" for parameter, value in {"Architecture": architecture(), **parameters}.items()),
        AWS_ENDPOINT_URL=aws_url,
        **root.variables(),
    )
    say(f"stack {STACK} deployed by sam deploy")
    client: Any = boto3.client("cloudformation", endpoint_url=aws_url, **_credentials(root))  # type: ignore[call-overload]
    if recorded := recorded_only(client, STACK):
        say(f"recorded only, not tried here: {', '.join(recorded)}")
    described = client.describe_stacks(StackName=STACK)["Stacks"][0]
    return {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}


def architecture() -> str:
    """This machine's, in the template's words."""
    return "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"


def recorded_only(cloudformation: Any, name: str) -> list[str]:
    """The types of a stack that the local AWS did not create."""
    pages = cloudformation.get_paginator("list_stack_resources").paginate(StackName=name)
    types = {resource["ResourceType"] for page in pages for resource in page["StackResourceSummaries"]}
    return sorted(types & set(RECORDED_ONLY))


def _sam(folder: Path, *arguments: str, **environment: str) -> None:
    """Runs the SAM CLI, which leaves temporary folders behind: in `folder`, which goes with the run."""
    fixed = {
        **TEST.variables(),
        "SAM_CLI_TELEMETRY": "0",
        "TMPDIR": str(folder),
        "SAM_CLI_POLL_DELAY": "0.3",
    }
    done = subprocess.run(
        [ROOT / ".venv-sam/bin/sam", *arguments],
        cwd=ROOT,
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        timeout=_DEPLOY_SECONDS,
        check=False,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise StackFailed(f"sam {arguments[0]} failed:\n  " + "\n  ".join(lines[-12:]))
