"""What a session asks for in its own metadata: the keys, and how they are read. Granting it is not decided here.

Whoever may create a session writes it: take every value as a stranger's (docs/security.md).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

PREFIX = "sandbox-fleet."
LONGEST_VALUE = 512  # characters; the API's own limit of a session's metadata (W§7.2)


class Wishes(BaseModel):
    """The known keys, each named without its prefix; None: not asked for. A value is one printable line."""

    model_config = ConfigDict(frozen=True)
    size: str | None = None  # the name of a size class
    archive: str | None = None  # s3://bucket/key of what is unpacked into the workspace
    git: str | None = None  # https URL of a public repository, optionally with #reference
    tag: str | None = None  # whose costs these are: for the operator's own accounts


def wishes_in(metadata: Mapping[str, Any]) -> Wishes:
    """What of a session's metadata is ours and usable; the rest is left out."""
    return Wishes(**{name: _usable(metadata.get(PREFIX + name)) for name in Wishes.model_fields})


def unknown_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Keys with our prefix that mean nothing, or whose value cannot be used: most likely mistakes."""
    known = {PREFIX + name for name in wishes_in(metadata).model_dump(exclude_none=True)}
    return sorted(key for key in metadata if key.startswith(PREFIX) and key not in known)


def _usable(value: Any) -> str | None:
    if not isinstance(value, str) or not value.isprintable() or len(value) > LONGEST_VALUE:
        return None
    return value.strip() or None
