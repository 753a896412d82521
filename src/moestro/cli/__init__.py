"""The command line: one verb per file, and no heavy import before a verb runs."""
