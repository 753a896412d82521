"""How fast a model runs on this machine, compared with other programs."""
