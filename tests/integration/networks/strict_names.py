"""Asks for names and never for one again: ``strict_names.py NAME...``; ends on SIGTERM, tells what it saw as JSON.

``answered``: ``NAME=ADDRESS,...``, sorted, and how often that was the answer.  With ``--at-least N`` it asks on until
it has asked so often.
"""

import argparse
import itertools
import json
import signal
import sys
import threading

from resolving import ask  # type: ignore[import-not-found]

PAUSE_S = 0.002
"""Pause between questions, so that the client leaves the processors to the servers."""

parser = argparse.ArgumentParser()
parser.add_argument("--at-least", type=int, default=0)
parser.add_argument("names", nargs="+")
words = parser.parse_args()

over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
answered: dict[str, int] = {}
failed: list[str] = []
print("asking", flush=True)
for asked, name in enumerate(itertools.cycle(words.names)):
    if over.wait(PAUSE_S) and asked >= words.at_least:
        break
    try:
        answer = f"{name}={','.join(sorted(ask(name)))}"
    except OSError as error:
        failed.append(f"{name} {type(error).__name__}: {error}")
    else:
        answered[answer] = answered.get(answer, 0) + 1
json.dump({"answered": answered, "failed": failed}, sys.stdout)
