"""A whole Trunkline on one machine, for development, demonstrations and tests."""
