"""The process that owns an engine and its slots; hosted by a Pod or by a Modal container."""
