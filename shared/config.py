"""What a function is told by its environment, read once (template.yaml sets it). No defaults for what must be given."""

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from shared import sizes

SHARD = "0"


class Missing(Exception):
    """Configuration is missing or wrong; the message names the variables and what sets them."""


def _parsed(classes: object) -> object:
    return sizes.parse(classes) if isinstance(classes, str) else classes


class Config(BaseModel):
    """Every setting, named as its variable without `FLEET_`; a function's own are set, others keep their default."""

    model_config = ConfigDict(frozen=True)
    table: str
    environment_id: str = ""
    base_url: str = "https://api.anthropic.com"
    key_secret_arn: str = ""
    webhook_secret_arn: str = ""
    queue_url: str = ""
    state_machine_arn: str = ""
    sandbox_log_group: str = ""
    cluster_arn: str = ""
    task_definition_arn: str = ""
    task_definition_2_arn: str = ""  # of SandboxImage2 and SandboxImage3, for size classes that name them
    task_definition_3_arn: str = ""
    exec_role_arn: str = ""  # only with EnableExec: what RunTask gives a sandbox for ECS Exec
    size_classes: Annotated[dict[str, sizes.SizeClass], BeforeValidator(_parsed)] = {}
    subnets: str = ""
    security_groups: str = ""
    assign_public_ip: str = "ENABLED"
    stopper_function: str = ""
    poller_function: str = ""
    max_sessions: int = 20
    poll_window_seconds: int = 0
    lease_ttl_seconds: int = 300
    beat_interval_seconds: int = 30
    max_attempts: int = 3
    start_timeout_seconds: int = 600
    breaker_max_hold_seconds: int = 3_600
    launch_timeout_seconds: int = 1_800
    spot_weight: int = 0
    session_timeout_seconds: int = 14_400
    stall_timeout_seconds: int = 3_600
    stop_timeout_seconds: int = 120
    retention_days: int = 30
    hand_over_environment_key: bool = False
    dead_letters_url: str = ""
    force_stop_strands: bool = False
    staging_buckets: str = ""
    staging_git_hosts: str = ""
    staging_max_mib: int = 500
    outputs_bucket: str = ""  # empty: outputs are off
    outputs_prefix: str = ""
    outputs_max_files: int = 100
    outputs_max_file_mib: int = 100
    outputs_max_total_mib: int = 500

    @property
    def shortest_wall_seconds(self) -> int:
        """The earliest that any turn's wall clock can end it, whatever its size class."""
        walls = (size.wall for size in self.size_classes.values() if size.wall)
        return min([self.session_timeout_seconds, *walls])

    def task_definition_of(self, size: sizes.SizeClass | None) -> str:
        """Of the image that the class names; without one, the default's."""
        others = {2: self.task_definition_2_arn, 3: self.task_definition_3_arn}
        return others.get(size.image, "") if size and size.image else self.task_definition_arn

    @property
    def retention_seconds(self) -> int:
        return self.retention_days * 86_400


def from_env(*needed: str, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration; raises Missing if one of `needed` (field names) or the table is empty or wrong."""
    given = {
        name: environ[f"FLEET_{name.upper()}"] for name in Config.model_fields if environ.get(f"FLEET_{name.upper()}")
    }
    absent = [f"FLEET_{name.upper()}" for name in ("table", *needed) if name not in given]
    if absent:
        raise Missing(f"{', '.join(absent)} not set: template.yaml sets it, so deploy the stack again")
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        wrong = ", ".join(f"FLEET_{str(part['loc'][0]).upper()} ({part['msg']})" for part in error.errors())
        raise Missing(f"wrong value in {wrong}: correct the stack's parameters") from None
