"""Size classes: the machines that the stack's owner lists, of which a session may name one (shared/wishes.py).

The list is template.yaml's `SizeClasses`, whose pattern refuses at the deploy what Fargate does not offer.
"""

from pydantic import BaseModel, ConfigDict


class SizeClass(BaseModel):
    """One machine. What is None stays as the stack's other parameters say."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    cpu: int  # CPU units: 1024 are one vCPU
    memory: int  # MiB
    disk: int | None = None  # GiB
    spot: bool | None = None  # on Spot capacity as long as that serves (lifecycle.on_spot), or never
    wall: int | None = None  # seconds: the turn's wall clock
    image: int | None = None  # the number of the `SandboxImage` parameter


def parse(text: str) -> dict[str, SizeClass]:
    """By name, of `name:cpu=1024:memory=2048[:disk=][:spot=][:wall=][:image=]`, joined by commas. Raises ValueError."""
    found = {}
    for listed in filter(None, text.split(",")):
        name, *settings = listed.split(":")
        found[name] = SizeClass.model_validate({"name": name, **dict(setting.split("=", 1) for setting in settings)})
    return found
