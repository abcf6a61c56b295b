"""The one logger: JSON lines, the service named by POWERTOOLS_SERVICE_NAME. Nothing secret is ever passed to it."""

import logging

from aws_lambda_powertools import Logger

log = Logger()
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a call would cost more than it tells
