"""Fuzz the parser of the guest's agent, bounded: compiled for this machine with sanitizers and fed mutated frames.

    python tools/fuzz/agent.py [--turns 200000] [--seed 1]

By gcc with AddressSanitizer where it is installed, else by Zig with what it has (UndefinedBehaviorSanitizer). The exit
code is that of the fuzzer: not 0 for a finding. The host's parser is the target `frames` of fuzz.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUEST = HERE.parents[1] / "engine" / "runtimes" / "vm" / "guest"


def compilers() -> list[list[str]]:
    checks = ["-g", "-O1", "-std=gnu11", "-fno-sanitize-recover=all", "-fsanitize=undefined"]
    gcc = [["gcc", *checks, "-fsanitize=address"]] if shutil.which("gcc") else []
    return [*gcc, [sys.executable, "-m", "ziglang", "cc", *checks]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        program = f"{place}/fuzz"
        for compiler in compilers():
            argv = [*compiler, f"-I{GUEST}", "-o", program, str(HERE / "agent.c"), str(GUEST / "frame.c")]
            built = subprocess.run(argv, capture_output=True, text=True, timeout=300)
            if built.returncode == 0:
                break
        else:
            print(built.stderr, file=sys.stderr)
            return 2
        done = subprocess.run([program, str(options.turns), str(options.seed)], timeout=600)
        return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
