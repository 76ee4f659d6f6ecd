"""Desired, installed and live state, and what keeps them the same."""
