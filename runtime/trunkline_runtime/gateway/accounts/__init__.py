"""The ledger: a line for each caller that asked for a slot, and where these lines go."""
