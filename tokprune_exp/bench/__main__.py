"""The command line of the bench; what the user can mend is one sentence and exit code 2."""

import sys

from tokprune_exp.bench.arguments import read_arguments
from tokprune_exp.errors import told_in_a_sentence


def main() -> None:
    """Run the command that the first argument names; without such a name it is a model directory."""
    arguments = read_arguments(sys.argv[1:])
    with told_in_a_sentence():
        if arguments.command == "selection":
            from tokprune_exp.bench.selection import bench
        elif arguments.command == "training":
            from tokprune_exp.bench.training import bench
        else:
            from tokprune_exp.bench.speed import bench
        bench(arguments)


if __name__ == "__main__":
    main()
