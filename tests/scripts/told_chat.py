"""`mtsql chat` without a model, so that it starts at once: `told_chat.py terminal|web FOLDER`. TOLD
is a JSON list of episodes, TOLD_SECS the seconds that each word takes."""

import json
import os
import sys
from pathlib import Path

from helpers.told import told_session
from mtsql.chat.screen import Screen
from mtsql.chat.terminal import talk
from mtsql.chat.web import serve
from mtsql.run.signals import Terminated, exit_code, stoppable

if __name__ == "__main__":
    screen, folder = sys.argv[1:]
    secs = float(os.environ.get("TOLD_SECS", "0"))
    session = told_session(Path(folder), *json.loads(os.environ["TOLD"]), secs_per_word=secs)
    with stoppable():
        try:
            if screen == "web":
                serve(session, 0, 20, ["how many singers are there ?"])
            else:
                talk(session, Screen(20), [])
        except KeyboardInterrupt as stop:
            assert isinstance(stop, Terminated) or not sys.stdin.isatty()
            sys.exit(exit_code(stop))
