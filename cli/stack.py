"""The stack that a command works on: found through CloudFormation, reached with the operator's own credentials.

Rules and calls are shared's; this builds its parts as the functions do, from the functions' own settings.
"""

import difflib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import ClientError

from cli.terminal import Code, Failure
from local import kept
from shared import wiring
from shared.config import SHARD, Config, Missing, from_env
from shared.log import log
from shared.record import Lease, LiveEntry, Record
from shared.store import DynamoStore
from shared.stored_key import StoredKey
from shared.work_api import WorkApi

DEFAULT_STACK = "sandbox-fleet"
FUNCTIONS = ("Poller", "Launcher", "Keeper", "Stopper", "Observer", "Tickets", "Webhook", "Janitor")
_AT_ONCE = 16
_LONGEST_CALL = 310  # seconds: a janitor's round is waited for


@dataclass
class Fleet:
    """What the global options chose. Nothing is looked up before it is needed, and then once."""

    name: str = DEFAULT_STACK
    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    json: bool = False
    _clients: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """For every client that is built after this, ours and shared's."""
        if self.endpoint_url:
            os.environ["AWS_ENDPOINT_URL"] = self.endpoint_url
        if self.is_local and not self.profile:  # a local AWS has its own credentials, and needs to see no real ones
            found = kept.find()
            own = (
                (found.access_key, found.secret_key) if found and found.aws_url == self.endpoint_url else ("test",) * 2
            )
            os.environ.update(AWS_ACCESS_KEY_ID=own[0], AWS_SECRET_ACCESS_KEY=own[1])
            os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
        boto3.setup_default_session(profile_name=self.profile, region_name=self.region)
        log.handlers.clear()  # a function's log lines are not for an operator's terminal; what matters is said
        log.addHandler(logging.NullHandler())

    def client(self, service: str) -> Any:
        """A client of the chosen account, region and endpoint."""
        if service not in self._clients:
            settings = BotoConfig(
                retries={"mode": "standard", "max_attempts": 3}, connect_timeout=5, read_timeout=_LONGEST_CALL
            )
            self._clients[service] = boto3.client(service, config=settings)  # type: ignore[call-overload]
        return self._clients[service]

    @property
    def is_local(self) -> bool:
        """Whether this is a local AWS, which has no console to link to."""
        return (urlsplit(self.endpoint_url or "").hostname or "") in ("127.0.0.1", "localhost", "::1")

    @cached_property
    def description(self) -> dict[str, Any]:
        """CloudFormation's of the stack. Raises Failure if there is none."""
        try:
            found: dict[str, Any] = self.client("cloudformation").describe_stacks(StackName=self.name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" not in str(error):
                raise
            where = self.client("cloudformation").meta.region_name
            raise Failure(
                f"There is no stack {self.name!r} in {where}: name it with --stack, choose --region and --profile, "
                "or deploy it (docs/operations.md).",
                Code.NOT_FOUND,
            ) from None
        return found

    @cached_property
    def outputs(self) -> dict[str, str]:
        return {output["OutputKey"]: output["OutputValue"] for output in self.description.get("Outputs", ())}

    def output(self, name: str) -> str:
        """Raises Failure where the stack lacks it: an older one, or one that failed to deploy."""
        if name not in self.outputs:
            status = self.description["StackStatus"]
            raise Failure(
                f"Stack {self.name!r} ({status}) has no output {name}: is it sandbox-fleet's, and fully deployed?"
            )
        return self.outputs[name]

    @cached_property
    def resources(self) -> dict[str, dict[str, Any]]:
        """The stack's resources by their logical ids, as CloudFormation lists them."""
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=self.name)
        return {part["LogicalResourceId"]: part for page in pages for part in page["StackResourceSummaries"]}

    def resource(self, logical_id: str) -> str:
        """The physical id. Raises Failure where there is none."""
        found = self.resources.get(logical_id, {}).get("PhysicalResourceId")
        if not found:
            raise Failure(f"Stack {self.name!r} has no {logical_id}: deploy the template of this checkout.")
        return str(found)

    def function(self, name: str) -> str:
        """The name of one of FUNCTIONS in the account."""
        return self.resource(f"{name}Function")

    @cached_property
    def config(self) -> Config:
        """The settings that the functions have: janitor and launcher together know every one."""
        given: dict[str, str] = {}
        for name in ("Launcher", "Janitor", "Webhook"):
            settings = self.client("lambda").get_function_configuration(FunctionName=self.function(name))
            given |= settings.get("Environment", {}).get("Variables", {})
        try:
            return from_env(environ=given)
        except Missing as missing:
            raise Failure(f"The functions' settings cannot be read: {missing}.") from None

    @cached_property
    def store(self) -> DynamoStore:
        return wiring.store(Config(table=self.output("TableName")))

    @cached_property
    def key(self) -> StoredKey:
        return wiring.environment_key(self.config)

    @cached_property
    def api(self) -> WorkApi:
        """The Work API with the stack's environment key, as the functions call it."""
        return wiring.work_api(self.config, self.key)

    # --- records ----------------------------------------------------------------------------------------------

    def live(self) -> list[LiveEntry]:
        return self.store.live(SHARD)

    def live_records(self) -> list[Record]:
        """The newest word of each live record; one that ended meanwhile is left out."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            records = pool.map(lambda entry: self.store.get(entry.work_id), self.live())
            return [record for record in records if record is not None and record.is_live]

    def records(self) -> Iterator[Record]:
        """Every record, live and ended: a scan of the whole table."""
        return self.store.records()

    def leases(self, records: list[Record]) -> dict[str, Lease]:
        return self.store.get_leases([record.work_id for record in records])

    def find(self, given: str) -> Record:
        """The record of a work id or a session id. Raises Failure that offers the nearest ids."""
        record = self.store.get(given) if given.strip() else None
        if record is not None:
            return record
        records = list(self.records())
        by_session = [record for record in records if given and record.session_id == given]
        if by_session:
            return max(by_session, key=lambda record: record.turn)
        ids = {known for record in records for known in (record.work_id, record.session_id) if known}
        near = difflib.get_close_matches(given, sorted(ids), n=3, cutoff=0.5)
        near = near or sorted(known for known in ids if given and given.lower() in known.lower())[:3]
        hint = f"Did you mean {', '.join(near)}?" if near else "`fleet ls --all` lists every session that is known."
        raise Failure(f"No session or work item {given!r} is known here. {hint}", Code.NOT_FOUND)
