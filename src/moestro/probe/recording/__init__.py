"""Routing decisions: recorded from any model, kept in a file, forced again."""
