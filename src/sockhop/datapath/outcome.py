"""What became of a socket that was to be ended or moved."""

from dataclasses import dataclass
from enum import StrEnum

from sockhop.datapath.sockets import Socket

__all__ = ["Action", "Outcome"]


class Action(StrEnum):
    """What was done with a socket."""

    SEVERED = "severed"
    RESTEERED = "resteered"
    GONE = "gone"
    """It had ended, or gone to another peer, by itself."""
    REFUSED = "refused"
    """The kernel, or a permission, did not let it be; the reason says why."""
    LEFT = "left"
    """It was left alone on purpose; the reason says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A socket as it was before, and what was done with it. `reason` is for people."""

    socket: Socket
    action: Action
    reason: str = ""
