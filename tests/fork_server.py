"""Forks processes that have imported everything already, so that many runs start, and end, in little time.

Each line of its input is a request, answered by a line: `{"words", "log", "seconds"}` runs a command line in a session
of its own, with its errors in a log, kills all of that after some seconds (None for never), and gives its exit status;
`{"shell"}` runs a line of shell where the fork_server is.
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
    os.kill(pid, signal.SIGKILL)  # as the group, if it has become one by now
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


for line in sys.stdin:
    request = json.loads(line)
    shell = request.pop("shell", None)
    answer = run(**request) if shell is None else subprocess.run(shell, shell=True).returncode
    print(json.dumps(answer), flush=True)
