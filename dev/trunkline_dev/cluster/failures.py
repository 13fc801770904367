"""What a cluster that cannot be raises."""


class ClusterError(RuntimeError):
    """The cluster did not start, or a part of it failed; the text says which and what to do."""
