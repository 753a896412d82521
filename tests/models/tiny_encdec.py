"""Settings of the small encoder-decoder that several tests build."""

from moestro.config import EncDecConfig

CAPACITY = 3
POSITIONS = {"kind": "relative", "shared": True, "buckets": 8, "max_distance": 12}


def settings(capacity=CAPACITY, tied=True, **changes):
    """Of a model of 4 + 2 layers, every second one a mixture of 4 experts."""
    mixture = {"hidden_dim": 24, "num_experts": 4, "top_k": 1, "activation": "relu"}
    values = {
        "vocab_size": 60,
        "dim": 32,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "attention": {"num_heads": 4, "head_dim": 6, "positions": POSITIONS},
        "dense": {"hidden_dim": 24, "activation": "relu"},
        "moe": {**mixture, "capacity": {"per_sequence": capacity} if capacity else None},
        "moe_every": 2,
        "head": {"tied": tied, "scale": 32**-0.5 if tied else 1.0},
    }
    return EncDecConfig(**(values | changes))
