"""Seconds until a command that needs no torch has answered, beside a bare interpreter. `make bench`."""

import subprocess
import sys
import time
from collections.abc import Callable

from tests.benchmarks.measure import in_turns

BOUND_S = 0.5


def timed(*words: str) -> Callable[[], float]:
    def turn() -> float:
        start_s = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start_s

    return turn


def main() -> int:
    words = ["--help", "--version", "schema"]
    took_s = in_turns({"python": timed("-c", "pass")} | {word: timed("-m", "toolkit", word) for word in words})
    for word in words:
        late = took_s[word] > BOUND_S
        print(f"toolkit {word:12}{took_s[word]:8.3f} s, python {took_s['python']:.3f} s, bound {BOUND_S} s", end="")
        print("  MISSED" if late else "  ok", flush=True)
    return int(max(took_s.values()) > BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
