"""A caller of OpenAI Realtime: places one call, speaks, listens, and keeps the call's own record.

`Caller` dials, sends a frame each time the clock says so, and reads. What it sends comes from a mouth and
what it hears goes to an ear, which are pure: `Question` and `Answer` for a spoken call, `Hum` and `Count`
for one that is only held.
"""

from trunkline_runtime.caller.hearing import Answer, Count, Playout
from trunkline_runtime.caller.line import Caller, ask
from trunkline_runtime.caller.records import CallError, CallLog, EndedBy, Line, Plan
from trunkline_runtime.caller.speaking import Hum, Question, append_message, audible_span

__all__ = [
    "Answer",
    "CallError",
    "CallLog",
    "Caller",
    "Count",
    "EndedBy",
    "Hum",
    "Line",
    "Plan",
    "Playout",
    "Question",
    "append_message",
    "ask",
    "audible_span",
]
