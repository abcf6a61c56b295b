"""Fixtures of the unit tests: the store's twins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
import pytest
from moto import mock_aws

from shared.store import DynamoStore, MemoryStore, Store

if TYPE_CHECKING:
    from types_boto3_dynamodb import DynamoDBClient


@pytest.fixture(params=["memory", "dynamodb"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    with dynamo_table() as client:
        yield DynamoStore(client, "work")


@contextmanager
def dynamo_table() -> Iterator["DynamoDBClient"]:
    """A client of moto's DynamoDB, with the `work` table in it."""
    with mock_aws():
        client = boto3.client("dynamodb", region_name="us-east-1")
        create_work_table(client)
        yield client


def create_work_table(client: "DynamoDBClient") -> None:
    """The template's, by the name of `work`."""
    names = ["pk", "sk", "shard", "work_id"]
    client.create_table(
        TableName="work",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in names],
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        GlobalSecondaryIndexes=[
            {
                "IndexName": "live-index",
                "KeySchema": [
                    {"AttributeName": "shard", "KeyType": "HASH"},
                    {"AttributeName": "work_id", "KeyType": "RANGE"},
                ],
                "Projection": {"ProjectionType": "INCLUDE", "NonKeyAttributes": ["phase", "turn", "attempt"]},
            }
        ],
    )
