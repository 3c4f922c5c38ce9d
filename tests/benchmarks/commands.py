"""Seconds until a command that needs no torch has answered, beside a bare interpreter. `make bench`."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.measure import in_turns

BOUND_S = 0.5
RUNS = 20


def timed(*words: str) -> Callable[[], float]:
    def turn() -> float:
        start_s = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start_s

    return turn


def left_behind(folder: Path) -> None:
    """What many runs leave, a day of metrics each."""
    for number in range(RUNS):
        run = folder / f"run-{number}"
        (run / "logs").mkdir(parents=True)
        (run / "logs/attempt-1-rank-0.log").write_text("said\n")
        (run / "config.yaml").write_text("checkpoint: {best: {metric: val/loss, mode: min}}\n")
        status = {"state": "completed", "step": 9, "total": 9, "attempt": 1, "heartbeat": "2026-01-01T00:00:00Z"}
        (run / "status.json").write_text(json.dumps(status))
        lines = [json.dumps({"step": step, "train/loss": 1.5, "val/loss": number / 7}) for step in range(1000)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        left_behind(Path(name))
        commands = [["--help"], ["--version"], ["schema"], ["status", name]]
        commands += [[word, f"{name}/run-3"] for word in ("status", "logs", "cancel")]
        shown = {" ".join(words).replace(name, "RUNS"): words for words in commands}
        took_s = in_turns(
            {"python": timed("-c", "pass")} | {key: timed("-m", "toolkit", *words) for key, words in shown.items()}
        )
    for key in shown:
        late = took_s[key] > BOUND_S
        print(f"toolkit {key:20}{took_s[key]:8.3f} s, python {took_s['python']:.3f} s, bound {BOUND_S} s", end="")
        print("  MISSED" if late else "  ok", flush=True)
    return int(max(took_s.values()) > BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
