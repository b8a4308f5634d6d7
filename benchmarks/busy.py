"""Measures how long the quickstart takes for one task on idle cores, and beside one busy process.

    uv run python benchmarks/busy.py

Idle OpenMP threads spin while they wait for work. Where there are fewer cores than busy threads, that slows down all of
them, so the command line bounds the spinning. This compares its bound with OpenMP's own and with others. The contenders
take turns; a figure is the median over rounds of the seconds from the start of the stream to its end.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

CONTENDERS = {  # the first is what libgomp does if nothing is set
    "300000 spins (default of OpenMP)": {"GOMP_SPINCOUNT": "300000"},
    "recast_pl": {},
    "1000 spins": {"GOMP_SPINCOUNT": "1000"},
    "3000 spins": {"GOMP_SPINCOUNT": "3000"},
    "10000 spins": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def seconds(settings: dict[str, str]) -> float:
    """Trains the task `people` in a new process, and returns the seconds that its stream took."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--config", "quickstart.yaml", "--run_dir", folder, "--only", "people"]
        command = [sys.executable, "-m", "recast_pl", *words]
        subprocess.run(command, env=inherited | settings, check=True, capture_output=True)
        (record,) = Path(folder, "tasks").glob("*.json")
        return json.loads(record.read_text())["wall_seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    medians = {}
    for state in ("idle", "beside one busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if state != "idle" else nullcontext()
        with busy:
            times = {name: [] for name in options.contenders}
            for _ in range(options.rounds):
                for name in options.contenders:
                    times[name].append(seconds(CONTENDERS[name]))
            medians[state] = {name: statistics.median(values) for name, values in times.items()}
            if state != "idle":
                busy.kill()
    idle, beside = medians.values()
    own = idle[options.contenders[0]]
    print("| spinning | idle (s) | ratio to the first | beside one busy process (s) | ratio to idle |")
    print("|---|---:|---:|---:|---:|")
    for name in options.contenders:
        alone, shared = idle[name], beside[name]
        print(f"| {name} | {alone:.1f} | {alone / own:.2f} | {shared:.1f} | {shared / alone:.2f} |")


if __name__ == "__main__":
    main()
