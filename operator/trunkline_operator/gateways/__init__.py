"""The gateways: the links to all of them, what they are told, and what they say put together."""
