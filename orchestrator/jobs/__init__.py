"""A study as a job on a cluster: what is shipped, how it starts and starts again, and what is checked before."""
