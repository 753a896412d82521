"""Whole models: attention, blocks, the decoder, its dense twin, their cost and checkpoints."""
