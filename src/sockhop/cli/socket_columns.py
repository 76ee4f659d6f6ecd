"""The columns of sockets, for the commands that list them."""

from sockhop.cli.output import Column, age

__all__ = ["SOCKET_COLUMNS", "action_columns"]

_UNITS = ("", "K", "M", "G", "T")
_WOULD = {"severed": "would sever", "resteered": "would resteer"}


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else age(seconds)


def _size(number: int) -> str:
    """Return bytes in units of 1024, as ls -h does: 0, 512, 1.5K, 20M."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    text = f"{value:.1f}" if unit and value < 10 else f"{value:.0f}"
    return text + _UNITS[unit]


SOCKET_COLUMNS = (
    Column("PROTOCOL", "protocol"),
    Column("STATE", "state"),
    Column("LOCAL", "local"),
    Column("REMOTE", "remote"),
    Column("FRONTEND", "frontend"),
    Column("SERVICE", "shown_service"),
    Column("AGE", "age", text=_age),
    Column("SENT", "sent", text=_size),
    Column("RECEIVED", "received", text=_size),
    Column("NETNS", "shown_netns"),
    Column("PROCESS", "processes"),
    Column("CHOSEN BY", "reason", wide=True),
    Column("WAITING", "waiting", wide=True),
    Column("COOKIE", "cookie", wide=True),
    Column("CGROUP", "cgroup", wide=True),
    Column("GENERATION", "generation", wide=True),
    Column("BACKEND-ID", "backend_id", wide=True),
)


def action_columns(*, really: bool) -> tuple[Column, ...]:
    """Return the columns of what was done to sockets, or unless *really*, would be."""
    text = str if really else (lambda action: _WOULD.get(action, action))
    return (Column("ACTION", "action", text=text), Column("REASON", "why"), *SOCKET_COLUMNS)
