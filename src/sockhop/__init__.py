"""sockhop: balances, splices, severs and diagnoses the sockets of a Linux node."""

__all__ = ["__version__"]

__version__ = "0.1.0"
