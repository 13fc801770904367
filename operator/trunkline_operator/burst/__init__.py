"""The agents' Modal apps: the one client, deployments, and the breaker of snapshots."""
