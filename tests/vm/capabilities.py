"""What is tried on other kernels: the rows of the table in docs/kernels.md, and what they need."""

__all__ = ["CAPABILITIES", "NEEDS", "PARTS"]

# What a row of the table means: the tests that show it. None of them compiles a mutant.
CAPABILITIES = {
    "every BPF object loads": ["tests/kernel/test_objects.py::test_it_loads"],
    "agent: load, attach, follow changes, detach": [
        "tests/agent/test_agent.py::test_a_changed_manifest_is_followed",
        "tests/agent/test_agent.py::test_the_datapath_outlives_the_agent",
        "tests/agent/test_agent.py::test_detach_on_exit",
    ],
    "`clients` by network namespace": [
        "tests/agent/test_agent.py::test_a_service_for_one_namespace"
    ],
    "`clients` by cgroup": ["tests/agent/test_agent.py::test_a_service_for_some_cgroups"],
    "round-robin, maglev, session affinity": [
        "tests/datapath/test_statistics.py::test_round_robin_is_exact",
        "tests/datapath/test_statistics.py::test_maglev_keeps_what_is_bound",
        "tests/datapath/test_choice.py::test_a_client_stays_with_its_backend",
    ],
    "unconnected UDP": [
        "tests/datapath/test_datagrams.py::test_the_answer_comes_from_the_frontend",
        "tests/datapath/test_datagrams.py::test_it_moves_when_its_backend_leaves[quarantined-IPv4]",
        "tests/datapath/test_datagrams.py::test_one_socket_talks_to_fifty_services[IPv4]",
    ],
    "listing sockets, live counts": [
        "tests/clients/test_socket_edges.py::test_one_udp_socket_connects_to_many",
        "tests/clients/test_socket_edges.py::test_a_udp_socket_that_is_dissolved_has_no_peer",
    ],
    "explain": [
        "tests/cli/test_explain.py::test_a_socket_of_another_process",
        "tests/cli/test_explain.py::test_datagrams",
        "tests/cli/test_explain.py::test_bypass",
    ],
    "health checks": [
        "tests/agent/test_health.py::test_what_a_check_says",
        "tests/agent/test_health.py::test_an_unhealthy_backend_gets_no_new_connections",
        "tests/agent/test_health.py::test_an_agent_that_dies_forgets_nothing",
    ],
    "severing by iterator": ["tests/datapath/test_ending.py", "-k iterator"],
    "severing by netlink": ["tests/datapath/test_ending.py", "-k netlink"],
    "policies": [
        "tests/datapath/test_policies.py::test_what_is_denied_gets_eperm",
        "tests/datapath/test_policies.py::test_the_backend_counts_not_the_frontend",
    ],
    "policies by cgroup": [
        "tests/datapath/test_policies.py::test_the_cgroup_in_which_a_socket_was_made_counts",
    ],
    "resteering": [
        "tests/resteer/test_moves.py::test_its_next_datagram_arrives",
    ],
    "splicing": [
        "tests/splice/test_agent.py::test_a_service_that_is_named",
        "tests/splice/test_lanes.py::test_off_loses_no_byte",
        "tests/splice/test_lanes.py::test_stack_is_final_and_behind_what_was_spliced",
        "tests/splice/test_agent.py::test_metrics_and_bypass",
    ],
    "spliced connections end as plain ones": [
        "tests/splice/test_sequences.py::test_spliced_connections_end_as_plain_ones",
    ],
    "kTLS sockets are not spliced": ["tests/splice/test_others.py::test_ktls"],
    "auditing sockmaps, pair check, healing": [
        "tests/diagnose/test_audit.py::test_live_entries_and_stale_ones",
        "tests/diagnose/test_heal.py::test_the_incident_is_found_and_cured[Place.VETH4]",
    ],
    "doctor: why connections fail or hang": [
        "tests/diagnose/test_doctor.py::test_server_not_listening",
        "tests/diagnose/test_doctor.py::test_server_not_accepting",
        "tests/diagnose/test_doctor.py::test_server_accepts_and_does_not_answer",
        "tests/diagnose/test_doctor.py::test_no_free_local_port",
        "tests/diagnose/test_doctor.py::test_stale_sockmap_entry",
        "tests/diagnose/test_doctor.py::test_half_spliced_pair",
        "tests/diagnose/test_doctor.py::test_no_backend_one_that_is_gone_and_a_policy",
    ],
    "doctor --watch": [
        "tests/diagnose/test_watch.py::test_the_incident_is_found_once_and_its_end",
        "tests/diagnose/test_watch.py::test_a_full_queue_is_found_and_its_end",
    ],
    "call paths: tcp_recvmsg instead of tcp_bpf_recvmsg": [
        "tests/diagnose/test_trace.py::test_the_first_difference",
        "tests/diagnose/test_trace.py::test_answered_requests_do_not_differ",
    ],
}

# What a kernel may lack, as `sockhop features` there names it; without it that is not to work.
NEEDS = {
    "`clients` by cgroup": ("bpf_rdonly_cast",),
    "policies by cgroup": ("bpf_rdonly_cast",),
    "severing by iterator": ("bpf_sock_destroy",),
    "severing by netlink": ("SOCK_DESTROY for TCP",),
    "splicing": ("netns cookie in sock_ops",),
    "spliced connections end as plain ones": ("netns cookie in sock_ops",),
    "kTLS sockets are not spliced": ("netns cookie in sock_ops", "kTLS beside a sockmap"),
    "every BPF object loads": ("sk_storage in iterators",),
}

PARTS = {"every BPF object loads"}
"""Where one test can pass while another does not."""
