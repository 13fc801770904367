"""A local Modal: the unmodified SDK deploys to it, and real containers run."""
