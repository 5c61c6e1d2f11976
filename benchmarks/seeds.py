"""Mean and range of what finished runs measured, one row a number: runs that differ by their seed, say.

python benchmarks/seeds.py runs/chest-0 runs/chest-1 runs/chest-2
"""

from __future__ import annotations

import sys
from statistics import mean

from record import numbers

from pipelines.run import Run


def main(folders: list[str]) -> None:
    """Print the table."""
    found = [numbers(Run(folder)) for folder in folders]
    print(f"{'measure':60} {'mean':>8} {'least':>8} {'most':>8}  of {len(found)} runs")
    for name in found[0]:
        values = [of_run[name] for of_run in found if name in of_run]
        if len(values) == len(found):
            print(f"{' '.join(name):60} {mean(values):8.3f} {min(values):8.3f} {max(values):8.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
