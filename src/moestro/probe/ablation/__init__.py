"""What a model loses without an expert."""
