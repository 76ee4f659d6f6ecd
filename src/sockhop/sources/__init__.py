"""Where desired state comes from. Knows nothing of the kernel."""
