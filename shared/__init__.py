"""The library that all functions use (the Lambda layer): rules and clients; no handlers, nothing local."""

__version__ = "0.1.0"
