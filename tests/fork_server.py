"""Forks processes that have already imported everything, so that tests can start many runs quickly.

Each input line is a request, and each gets one output line, the exit status. `{"words", "log", "seconds"}` runs a
command line in a new session, writes its errors to a log, and kills it after some seconds (None for never). `{"shell"}`
runs a shell command in the folder of this process.
"""

import json
import os
import signal
import subprocess
import sys
import time

import recast_pl.cli.fit  # noqa: F401
from recast_pl.cli import main


def run(words, log, seconds=None):
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        sys.exit(main(words))
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


for line in sys.stdin:
    request = json.loads(line)
    shell = request.pop("shell", None)
    answer = run(**request) if shell is None else subprocess.run(shell, shell=True).returncode
    print(json.dumps(answer), flush=True)
