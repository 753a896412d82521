"""The command line: one verb a file, and nothing heavy imported before a verb runs."""
