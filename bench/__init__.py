"""Measurements beside the official SDK, and what they cost at list prices: `make bench`. Nothing here is deployed."""
