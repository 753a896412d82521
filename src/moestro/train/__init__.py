"""Text to batches, batches to a trained model: data, optimiser, loop, saved state."""
