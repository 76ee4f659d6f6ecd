"""Random desired states: few names and addresses, so that changes meet each other."""

from hypothesis import strategies as st

from sockhop.model import (
    Algorithm,
    Backend,
    BackendState,
    Clients,
    Desired,
    Frontend,
    FrontendType,
    Protocol,
    Service,
)

__all__ = ["PLACES", "desired_states"]

PLACES = {"/a": 11, "/b": 12, "/run/netns/a": 21, "/run/netns/b": 22}

_NAMESPACES = st.sampled_from([None, "host", "all", ("/run/netns/a",), ("/run/netns/gone",)])
_CGROUPS = st.sampled_from([(), ("/a",), ("/a", "/b"), ("/gone",)])
_FRONTENDS = st.tuples(
    st.sampled_from(["10.0.0.1", "10.0.0.2", "127.96.0.1", "fd00::1", "::1"]),
    st.sampled_from([53, 80]),
    st.sampled_from(list(Protocol)),
)


def _backends(v6: bool) -> st.SearchStrategy[list[Backend]]:
    v4 = ["10.1.0.1", "10.1.0.2", "127.0.0.1"]
    return st.lists(
        st.builds(
            Backend,
            st.sampled_from(["fd00::a", "fd00::b", "::1"] if v6 else v4),
            st.integers(8080, 8082),
            st.sampled_from(list(BackendState)),
            st.integers(0, 3),
        ),
        max_size=5,
        unique_by=lambda backend: (backend.address, backend.port),
    )


@st.composite
def desired_states(draw: st.DrawFn) -> Desired:
    """Up to eight unique frontends, spread over up to three services."""
    owned: dict[str, list[Frontend]] = {}
    for address, port, protocol in draw(st.lists(_FRONTENDS, unique=True, max_size=8)):
        backends = tuple(draw(_backends(":" in address)))
        name = draw(st.sampled_from(["a", "b", "c/d"]))
        kind = draw(st.sampled_from([FrontendType.VIP, FrontendType.CLUSTER_IP]))
        # A backend has one state and weight in a service, as in a manifest.
        known = {(b.address, b.port): b for f in owned.get(name, ()) for b in f.backends}
        backends = tuple(known.get((b.address, b.port), b) for b in backends)
        frontend = Frontend(address, port, protocol, kind, "", backends)
        owned.setdefault(name, []).append(frontend)
    return Desired(tuple(draw(_service(name, tuple(owned[name]))) for name in sorted(owned)))


def _service(name: str, frontends: tuple[Frontend, ...]) -> st.SearchStrategy[Service]:
    return st.builds(
        Service,
        st.just(name),
        st.just(frontends),
        st.sampled_from(list(Algorithm)),
        st.sampled_from([0, 60]),
        st.sampled_from([(), (BackendState.TERMINATING, BackendState.QUARANTINED)]),
        st.booleans(),
        st.none() | st.builds(Clients, _NAMESPACES, _CGROUPS, _CGROUPS),
    )
