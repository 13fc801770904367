"""A spoken question and its answer, through the stock `openai` client."""

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection

from trunkline_runtime.audio.wav import write_wav
from trunkline_runtime.caller import Answer, Plan, Question
from trunkline_runtime.engine.speech.recognition import Recogniser
from trunkline_runtime.engine.speech.replies import readings
from trunkline_runtime.engine.speech.synthesis import Synthesiser

CALL_SECONDS: Final = 60.0
NAMES: Final = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """What was asked, what the agent heard, and what its answer says when it is recognised again."""

    digits: str
    question: str
    heard: str
    answered: str
    answered_digits: str
    latency_ms: float  # end of speech → first audible sample of the answer, at its playout
    files: tuple[Path, Path]


def question(digits: str) -> str:
    """A sentence that holds four digits as words.

    "Then" between them keeps the recogniser from hearing "8 8" as "8 8 8" and "two" as "to": none of 60
    such sentences was misheard, and 2 to 7 % of those with commas alone.
    """
    return f"The digits are {', then '.join(NAMES[int(digit)] for digit in digits)}."


def digits_in(text: str) -> str:
    """The digits that were heard in a text, where some may be spelled as words that sound like them."""
    found = ("".join(re.findall(r"\d", reading)) for reading in readings(text))
    return max(found, key=len)


async def _converse(
    connection: AsyncRealtimeConnection, mouth: Question, ear: Answer, plan: Plan
) -> None:
    """Speaks at the pace of speech and listens until the answer is complete."""

    async def speak() -> None:
        loop, sent = asyncio.get_running_loop(), 0
        began = loop.time()
        while True:
            sent += 1
            await asyncio.sleep(began + sent * plan.chunk_ms / 1000 - loop.time())
            message = json.loads(mouth.next(time.time()))
            await connection.input_audio_buffer.append(audio=message["audio"])

    speaking = asyncio.create_task(speak())
    try:
        async with asyncio.timeout(CALL_SECONDS):
            done = False
            while not done:
                raw = await connection.recv_bytes()
                now = time.time()
                connection.parse_event(raw)  # the client's own types must take it
                done = ear.hear(raw.decode(), now)
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)


def write_question(file: Path) -> tuple[str, bytes]:
    """Speaks a question with four random digits into a WAV file; gives the digits and the audio."""
    digits = "".join(random.choices("0123456789", k=4))
    audio = Synthesiser()(question(digits))
    write_wav(file, audio)
    return digits, audio


async def ask(url: str, key: str, agent: str, out: Path) -> Spoken:
    """Asks with four random digits; writes question.wav and answer.wav into `out`."""
    files = out / "question.wav", out / "answer.wav"
    digits, audio = await asyncio.to_thread(write_question, files[0])
    recognise = await asyncio.to_thread(Recogniser)
    plan = Plan(after_greeting=True, timeout_seconds=CALL_SECONDS)
    mouth = Question(audio, plan)
    ear = Answer(mouth, plan)
    async with (
        AsyncOpenAI(api_key=key, base_url=f"{url}/v1") as client,
        client.realtime.connect(model=agent) as connection,
    ):
        await _converse(connection, mouth, ear, plan)
    write_wav(files[1], bytes(ear.pcm))
    answered = await asyncio.to_thread(recognise, bytes(ear.pcm))
    assert ear.answer_heard is not None
    assert mouth.spoke_until is not None
    return Spoken(
        digits=digits,
        question=question(digits),
        heard=ear.heard[-1] if ear.heard else "",
        answered=answered,
        answered_digits=digits_in(answered),
        latency_ms=(ear.answer_heard - mouth.spoke_until) * 1000,
        files=files,
    )
