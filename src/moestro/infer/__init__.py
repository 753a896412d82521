"""Inference: choosing the next token, and streaming text from a prompt."""
