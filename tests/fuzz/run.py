"""All fuzzers, one after the other, with new seeds until the time is up: ``make fuzz MINUTES=30``.

It prints a line for each fuzzer and round: seed, examples, seconds. At the first fault it prints what pytest said, the smallest
program among it, and how to repeat it, and ends with status 1. A round that has begun is finished.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HANGS = 1800  # seconds; a fuzzer that takes longer hangs. Making a fault's program smaller takes five minutes of it.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round, 0 to 2**32 - 1; random unless given")
    parser.add_argument("--only", default="", help="fuzzers whose name has this in it")
    given = parser.parse_args()
    fuzzers = [path for path in sorted(HERE.glob("test_fuzz_*.py")) if given.only in path.stem]
    if not fuzzers:
        parser.error(f"no fuzzer has {given.only!r} in its name")
    chance = random.Random(given.seed) if given.seed is not None else random.SystemRandom()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the fuzzer at work too
    end, rounds, examples = time.monotonic() + 60 * given.minutes, 0, Counter[str]()
    while time.monotonic() < end:
        rounds += 1
        seed = given.seed if rounds == 1 and given.seed is not None else chance.randrange(2**32)
        for fuzzer in fuzzers:
            if time.monotonic() >= end:
                break
            begun = time.monotonic()
            status, out = run(fuzzer, seed)
            count = int((re.findall(r"^examples: (\d+)", out, re.MULTILINE) or ["0"])[-1])
            examples[fuzzer.stem] += count
            print(f"round {rounds}, seed {seed}: {fuzzer.stem}, {count} examples, {time.monotonic() - begun:.0f} s", flush=True)
            if status != 0:
                print(out)
                print(f"A fault in {fuzzer.stem}, round {rounds}. Repeat it with\n  ODENET_FUZZ=1 {command_line(fuzzer, seed)}")
                return 1
    each = ", ".join(f"{name.removeprefix('test_fuzz_')} {count}" for name, count in examples.items())
    print(f"No fault in {sum(examples.values())} examples of {rounds} rounds, {given.minutes:g} minutes ({each})")
    return 0


def arguments(fuzzer: Path, seed: int) -> list[str]:
    return [
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=short",
        "--show-capture=no",
        f"--hypothesis-seed={seed}",
        str(fuzzer.relative_to(ROOT)),
    ]


def command_line(fuzzer: Path, seed: int) -> str:
    return " ".join(["python", *arguments(fuzzer, seed)])


def run(fuzzer: Path, seed: int) -> tuple[int, str]:
    """Status and words of one process, with all that it started gone afterwards."""
    variables = {**os.environ, "ODENET_FUZZ": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        [sys.executable, *arguments(fuzzer, seed)],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=HANGS)
        return process.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        return 1, out + f"\nIt hangs: no end after {HANGS} s."
    except BaseException:  # Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


if __name__ == "__main__":
    sys.exit(main())
