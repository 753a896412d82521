"""How fast a model runs here, and opponents beside it."""
