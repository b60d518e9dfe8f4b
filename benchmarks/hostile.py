"""What `load` does with forged and mutated files.

    python benchmarks/hostile.py --files 100000

Real files are changed in their structure (objects replaced, deleted, doubled,
retargeted, renamed; classes, names and values of attackers put in), signed anew,
loaded, and used where they load: in processes with bounded memory and time, each of
which watches what Python's audit hooks tell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from _common import environment, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CHUNK = 2000  # files that a process tries


def try_files(first: int, n: int) -> None:
    """Try files, and print what happened; each depends on its number only."""
    import forgery
    import numpy as np

    guard = forgery.Guard()
    members = [forgery.parts(data) for data in forgery.real_files()]
    guard.outcomes.clear()
    slowest = 0.0
    for seed in range(first, first + n):
        rng = np.random.default_rng(seed)
        choose = lambda below: int(rng.integers(below))  # noqa: B023, E731
        changed = forgery.mutate_members(members[seed % len(members)], choose)
        data = forgery.archive_of(changed.items())
        start = time.perf_counter()
        if guard.run(data).startswith("load"):
            slowest = max(slowest, time.perf_counter() - start)
    told = {"outcomes": guard.outcomes, "seen": guard.seen, "slowest": slowest}
    print(json.dumps(told))


def main() -> None:
    """Try many files in processes, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--first", type=int, help="of a process's own files")
    given = parser.parse_args()
    if given.first is not None:
        try_files(given.first, given.files)
        return
    about = environment()
    start = time.perf_counter()
    outcomes: Counter[str] = Counter()
    seen: list[str] = []
    crashed: list[int] = []
    tried, slowest = 0, 0.0
    while tried < given.files and time.perf_counter() - start < 60 * given.minutes:
        n = min(CHUNK, given.files - tried)
        command = [sys.executable, __file__, "--first", str(tried), "--files", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            crashed.append(tried)
            print(done.stderr[-2000:], file=sys.stderr)
        else:
            told = json.loads(done.stdout.splitlines()[-1])
            outcomes.update(told["outcomes"])
            seen += told["seen"]
            slowest = max(slowest, told["slowest"])
        tried += n
    undocumented = {
        what: count
        for what, count in outcomes.items()
        if what.startswith("load") and what != "load: LoadError"
    }
    result = {
        "files": tried,
        "executions and writes": seen,
        "crashed processes, by their first file": crashed,
        "hangs": outcomes["hang"],
        "undocumented errors of load": undocumented,
        "slowest refusal in seconds": round(slowest, 3),
        "outcomes": dict(outcomes.most_common()),
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(result, indent=1))
    write_json("hostile-load", {"environment": about, **result})


if __name__ == "__main__":
    main()
