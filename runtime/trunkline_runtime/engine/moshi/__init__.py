"""Moshi: many full-duplex spoken conversations in one batch on one GPU.

torch and moshi are imported only inside this package, and only when an engine of it is asked for.
"""

import os

# moshi reads it when it is imported. Without it the first step compiles for half a minute (37 s on a CPU);
# Kyutai's own deployment sets it, too.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
