"""What people ask of a running Trunkline: why a call went where it went, and how full it is."""
