"""Expands a SAM template as CloudFormation would: JSON from standard input to standard output.

A script of its own since aws-sam-translator pins an older pydantic: `.venv-aws` runs it.
"""

import json
import sys
from typing import Any

import boto3
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator

# What `sam package` would have uploaded; the translator refuses local paths
_LOCAL = {"CodeUri": "s3://bucket/key", "ContentUri": "s3://bucket/key", "DefinitionUri": "s3://bucket/key"}


def expand(template: dict[str, Any]) -> dict[str, Any]:
    for resource in template["Resources"].values():
        properties = resource.get("Properties", {})
        properties |= {name: uri for name, uri in _LOCAL.items() if name in properties}
    translator = Translator({}, Parser(), boto_session=boto3.Session(region_name="us-east-1"))
    expanded: dict[str, Any] = translator.translate(template, parameter_values={})
    return expanded


if __name__ == "__main__":
    json.dump(expand(json.load(sys.stdin)), sys.stdout)
