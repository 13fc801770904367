"""One sans-I/O module per protocol that callers speak. No socket, no clock: ids and events come in."""
