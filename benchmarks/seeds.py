"""Mean and range of what finished runs measured, one row a number: runs that differ by their seed, say.

python benchmarks/seeds.py runs/chest-0 runs/chest-1 runs/chest-2
"""

from __future__ import annotations

import sys
from statistics import mean

from pipelines.run import Run


def main(folders: list[str]) -> None:
    """Print the table."""
    runs = [Run(folder) for folder in folders]
    found = [
        {f"{stage} {name}": value for stage, state in run.state["stages"].items()
         for name, value in ({"seconds": state["seconds"]} | state["result"]).items() if isinstance(value, float)}
        for run in runs
    ]  # fmt: skip
    print(f"{'measure':60} {'mean':>8} {'least':>8} {'most':>8}  of {len(runs)} runs")
    for name in found[0]:
        values = [numbers[name] for numbers in found if name in numbers]
        if len(values) == len(runs):
            print(f"{name:60} {mean(values):8.3f} {min(values):8.3f} {max(values):8.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
