"""Draw an analysis again: figures, page and W&B run from its tables, without any model.

python -m tokprune_exp.analysis.figures ANALYSIS_DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokprune_exp.bench.arguments import positive
from tokprune_exp.errors import told_in_a_sentence


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    arguments = read_arguments(sys.argv[1:])
    with told_in_a_sentence():
        from tokprune_exp.analysis.figures.present import present

        written = present(arguments.directory, arguments.wandb, arguments.sentences)
    print("Written:", *(f"  {path}" for path in written), sep="\n")


def read_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.analysis.figures",
        description="Draw the figures, the page and the W&B run of an analysis from its tables.",
    )
    parser.add_argument("directory", type=Path, metavar="ANALYSIS_DIR", help="what tokprune_exp.analyze wrote")
    parser.add_argument(
        "--sentences", type=positive, default=24, metavar="N", help="at most, on the page (default: 24)"
    )
    parser.add_argument("--wandb", choices=["offline", "online", "none"], default="offline")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
