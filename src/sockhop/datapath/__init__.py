"""Our BPF programs as objects."""
