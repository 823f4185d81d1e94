"""From files to batches: task → sources → tokenise → batches → module."""
