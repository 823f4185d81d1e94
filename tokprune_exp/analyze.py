"""What did a trained model keep? Every token of a split tagged, counted and compared, on the command line.

    python -m tokprune_exp.analyze MODEL_DIR --examples 1000
    python -m tokprune_exp.analyze MODEL_DIR --compare OTHER_MODEL_DIR

Nothing heavy is imported before the arguments are read, so that a mistake is answered at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tokprune_exp.bench.arguments import positive
from tokprune_exp.errors import told_in_a_sentence


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    arguments = read_arguments(sys.argv[1:])
    with told_in_a_sentence():
        from tokprune_exp.analysis.study import analyze

        analyze(arguments)


def read_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.analyze",
        description="Tag every token of a split and say which ones a trained model kept, against pruning at random, "
        "with intervals over the texts.",
    )
    root = os.environ.get("TOKPRUNE_DATA")
    parser.add_argument("model_dir", type=Path, help="a model directory: model/ of a finished run")
    parser.add_argument("--task", metavar="TASK", help="analyse the texts of another task than the model's own")
    parser.add_argument("--split", choices=["evaluation", "selection", "train"], default="evaluation")
    parser.add_argument("--examples", type=positive, metavar="N", help="so many texts of it (default: all)")
    parser.add_argument("--data-root", metavar="DIR", default=root, help="data.root of a run (default: $TOKPRUNE_DATA)")
    parser.add_argument(
        "--spacy",
        metavar="PIPELINE",
        default="en_core_web_md",
        help="an installed spaCy pipeline, or the folder of one (default: en_core_web_md, fetched inside a wheel)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for all tables (default: MODEL_DIR/analysis)")
    parser.add_argument("--random-draws", type=positive, default=20, metavar="N", help="prunings at random")
    parser.add_argument("--bootstrap", type=positive, default=1000, metavar="N", help="resamples of the texts")
    parser.add_argument("--domain-terms", type=positive, default=200, metavar="N", help="at most so many terms")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="MODEL_DIR", help="on the same texts")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: what torch chooses)")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
