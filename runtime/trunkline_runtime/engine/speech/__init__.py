"""Spoken conversations on CPU, offline. Models and their libraries come in when the engine is loaded."""

from trunkline_runtime.engine.speech.engine import SpeechEngine
from trunkline_runtime.engine.speech.recognition import Recogniser
from trunkline_runtime.engine.speech.synthesis import Synthesiser

__all__ = ["Recogniser", "SpeechEngine", "Synthesiser"]
