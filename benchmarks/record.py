"""Append what a finished run measured to benchmarks/runs.csv: one row a number, with the machine and the date.

python benchmarks/record.py runs/chest_xray-quick "python pipelines/full.py --dataset chest_xray …"
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pipelines.mistakes import in_a_line
from pipelines.run import Run

T = TypeVar("T")
TABLE = Path(__file__).with_name("runs.csv")


def program(options: type[T], main: Callable[[T], None], about: str | None, args: list[str] | None = None) -> None:
    """The command line of a benchmark: parse, run, and show a user's mistake as one line."""
    with in_a_line():
        main(tyro.cli(options, description=about, args=args))


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def here_and_now() -> dict[str, Any]:
    """What every row of a table begins with: date and machine."""
    return {"date": datetime.date.today().isoformat(), "machine": machine()}


def say(row: dict[str, Any]) -> None:
    """Print a row, as progress."""
    begins = here_and_now()
    print("  ".join(f"{k} {v}" for k, v in row.items() if k not in begins), flush=True)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, which begins with their names; beside one of other columns, in a file of their own."""
    while path.exists() and path.read_text().partition("\n")[0].strip() != ",".join(rows[0]):
        path = path.with_stem(f"{path.stem}-new")
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        if new:
            table.writeheader()
        table.writerows(rows)


def numbers(run: Run) -> dict[tuple[str, str], float]:
    """What a run measured: (stage, measure) -> value."""
    return {
        (stage, measure): value
        for stage, state in run.state["stages"].items()
        for measure, value in ({"seconds": state["seconds"]} | state["result"]).items() if isinstance(value, float)
    }  # fmt: skip


def main(folder: str, command: str) -> None:
    """Append the rows of one run."""
    run = Run(folder)
    commit = run.state["git"]
    common = here_and_now() | {"cores": os.cpu_count(), "commit": commit[:10] + commit[40:], "command": command}
    append(TABLE, [
        common | {"stage": stage, "measure": measure, "value": f"{value:.4g}"}
        for (stage, measure), value in numbers(run).items()
    ])  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
