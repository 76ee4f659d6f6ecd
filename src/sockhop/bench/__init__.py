"""What `sockhop bench` measures: sockhop beside its peers, in namespaces of its own."""
