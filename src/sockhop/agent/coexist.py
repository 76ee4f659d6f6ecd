"""Beside another tool that balances at the same hooks: whether to start, and what to leave it."""

import logging

import msgspec

from sockhop.datapath.cilium import CiliumFrontend, cilium_frontends
from sockhop.datapath.neighbours import Neighbourhood
from sockhop.errors import SystemLackError
from sockhop.sources.files import Loaded

__all__ = ["Coexistence", "refuse_rivals"]

_LOG = logging.getLogger(__name__)
_NAMED = 4


def refuse_rivals(neighbourhood: Neighbourhood, *, coexist: bool) -> None:
    """Raise SystemLackError if somebody else's programs may rewrite what our clients dial.

    With *coexist* log them instead.
    """
    rivals = [str(program) for program in neighbourhood.programs if program.is_rival]
    if not neighbourhood.is_complete:
        _LOG.warning("there are too many cgroups to look for other tools' programs in all of them")
    if not rivals:
        return
    if not coexist:
        more = f" and {len(rivals) - _NAMED} more" if len(rivals) > _NAMED else ""
        raise SystemLackError(
            f"somebody else may balance here: {', '.join(rivals[:_NAMED])}{more}",
            hint="stop that tool, or start beside it with --coexist: frontends of Cilium's are "
            "left to Cilium; with other tools, the program that runs first decides "
            "(`sockhop status` says which)",
        )
    for rival in rivals:
        _LOG.warning("beside ours: %s", rival)


class Coexistence:
    """What is left to Cilium, and was so when it was last looked at."""

    def __init__(self) -> None:
        """Read Cilium's maps, if there are any; SystemLackError where they cannot be read."""
        self._frontends = cilium_frontends()
        self._error = ""

    def refresh(self) -> bool:
        """Read again; whether anything differs. Where that fails the last answer holds."""
        try:
            found: frozenset[CiliumFrontend] = cilium_frontends()
        except SystemLackError as error:
            if str(error) != self._error:
                _LOG.warning("what was known of Cilium's frontends holds: %s", error)
            self._error = str(error)
            return False
        self._error = ""
        before, self._frontends = self._frontends, found
        return found != before

    def leave_out(self, loaded: Loaded) -> Loaded:
        """Return *loaded* without the frontends that Cilium has, and with a warning for each."""
        services, warnings = [], []
        for service in loaded.desired.services:
            left = [f for f in service.frontends if f.key in self._frontends]
            if left:
                kept = tuple(f for f in service.frontends if f.key not in self._frontends)
                service = msgspec.structs.replace(service, frontends=kept)
            services.append(service)
            warnings += [f"service {service.name}: {f} is left to Cilium" for f in left]
        desired = msgspec.structs.replace(loaded.desired, services=tuple(services))
        return Loaded(desired, (*loaded.warnings, *warnings))
