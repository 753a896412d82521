"""Published checkpoints in fewer bits: a file for each form, `methods.py` for what is stated."""
