"""The whole pipeline on the local stack."""
