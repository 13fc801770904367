"""The data plane of Trunkline: all that a call's audio passes through. Knows no Kubernetes."""

__version__ = "0.1.0"
