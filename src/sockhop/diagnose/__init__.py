"""Tells why a connection is stuck, with our agent, with another sockmap user, or with none."""
