"""The Kubernetes API: the one client, the Lease, Events, Secrets and certificates."""
