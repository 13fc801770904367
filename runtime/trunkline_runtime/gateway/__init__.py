"""The process that admits, places and relays calls."""
