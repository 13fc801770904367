"""Sample formats and rates."""
