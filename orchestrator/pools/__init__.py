"""Where segments run: in this process, on this machine, on a cluster."""
