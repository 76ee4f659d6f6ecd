"""Talks to Linux, knows nothing of services."""
