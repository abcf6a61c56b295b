"""A key kept in Secrets Manager, read with a short cache, so that a rotated key needs no deploy."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError
from pydantic import SecretStr

from shared.config import Missing

if TYPE_CHECKING:
    from types_boto3_secretsmanager import SecretsManagerClient

CACHE_SECONDS = 60.0
"""How long a process may go on with a key that is no longer the stored one."""


class StoredKey:
    """Call it for the key. Raises Missing while the secret holds none.

    `name` and `until` are for that message: what the key is, and what does not happen before it is there.
    """

    def __init__(
        self,
        client: "SecretsManagerClient",
        arn: str,
        *,
        name: str,
        prefix: str,
        until: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._arn, self._prefix, self._now = client, arn, prefix, now
        self._name, self._advice = name, f"put the {name} into the secret {arn}; until then {until}"
        self._key: SecretStr | None = None
        self._read_at = 0.0

    def __call__(self) -> SecretStr:
        if self._key is None or self._now() - self._read_at > CACHE_SECONDS:
            self._key, self._read_at = self._read(), self._now()
        return self._key

    def forget(self) -> None:
        """Read the secret anew at the next call: the server refused what we hold."""
        self._key = None

    def _read(self) -> SecretStr:
        try:
            text = self._client.get_secret_value(SecretId=self._arn).get("SecretString", "").strip()
        except ClientError as error:
            if error.response["Error"]["Code"] != "ResourceNotFoundException":
                raise
            raise Missing(f"the {self._name}'s secret has no value: {self._advice}") from None
        if not text.startswith(self._prefix):
            raise Missing(f"the {self._name}'s secret holds no key: {self._advice}")
        return SecretStr(text)
