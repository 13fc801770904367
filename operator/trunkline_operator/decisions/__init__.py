"""From an agent and the observed world to steps, bodies, routes, status and Events. Pure."""
