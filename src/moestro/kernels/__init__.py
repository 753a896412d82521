"""Tensors in, tensors out: no module, no settings. `reference` is the definition of each op."""
