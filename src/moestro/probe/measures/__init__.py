"""What a trace says about a model's routing, beside what chance would give."""
