"""How far apart two runs are: weights, losses, norms, and held-out bits."""

import math

from moestro.checkpoints.opening import open_checkpoint
from moestro.train.metrics import METRICS_NAME, read_metrics


def weights_of(run):
    folders = sorted((run / "checkpoints").iterdir())
    return open_checkpoint(folders[-1], verified=True).model.state_dict()


def gap(run, other):
    """Largest difference of weights, and of the losses and norms of any step, relative."""
    found, wanted = weights_of(run), weights_of(other)
    assert found.keys() == wanted.keys()
    gaps = [float((found[name] - wanted[name]).abs().max()) for name in wanted]
    pairs = zip(read_metrics(run / METRICS_NAME), read_metrics(other / METRICS_NAME), strict=True)
    for mine, theirs in pairs:
        assert mine["step"] == theirs["step"]
        layers = zip(mine["layers"], theirs["layers"], strict=True)
        gaps += [abs(one["dropped"] - other["dropped"]) for one, other in layers]
        gaps += [abs(mine[key] / theirs[key] - 1) for key in ("loss", "grad_norm")]
        bits = mine.get("bits_per_byte", {})  # their cross entropy is in fp32
        gaps += [abs(theirs["bits_per_byte"][name] / bits[name] - 1) / 1e6 for name in bits]
    assert all(map(math.isfinite, gaps))
    return max(gaps)


def bits(run):
    return read_metrics(run / METRICS_NAME)[-1]["bits_per_byte"]["all"]
