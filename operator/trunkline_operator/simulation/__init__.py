"""What an agent's settings would have cost for calls that are known: for benchmarks and for users."""
