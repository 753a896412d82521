"""Results of an ablation made by hand: `make_ablations`."""

import numpy as np

from moestro.probe.ablation.effects import Ablation, Ablations, TokenIdentity


def make_ablations(domains=("code", "prose"), own=(0.5, 0.1), matters=(True, False)):
    """One row for each of `own`, of layer 1 and domain 0, and one control."""
    two = np.array([0.0, 0.2])
    alike = TokenIdentity(0.5, 0.1, 0.1, 0.0, two, 1.0)
    several = np.tile(two, (len(domains), 1))
    rows = [
        Ablation(
            layer=1, expert=expert, other=None, domain=domains[0], control=control,
            change_M=np.full(len(domains), rise), change_interval_M2=several, own=rise,
            elsewhere=0.05, elsewhere_interval_2=two, difference=rise - 0.05,
            difference_interval_2=np.array([rise - 0.1, rise]), p_own=0.01, p_elsewhere=0.5,
            p_more=0.01, share_M=np.full(len(domains), 0.1), per_assignment=1.0,
            per_assignment_elsewhere=0.5, per_assignment_interval_2=two,
            control_per_assignment=float("nan"), control_interval_2=two * np.nan, by_input=alike,
            by_target=alike, verdict="matters more to its domain" if more else "no effect",
            matters_more=more,
        )
        for expert, (rise, more, control) in enumerate(
            [*zip(own, matters, [False] * len(own), strict=True), (0.0, False, True)]
        )
    ]  # fmt: skip
    return Ablations(
        fingerprint="0" * 32, mode="silence", unit="bits per token", domains=domains,
        tokens_M=np.full(len(domains), 100), documents_M=np.full(len(domains), 5), bytes_M=None,
        baseline_M=np.ones(len(domains)), baseline_interval_M2=several, rows=tuple(rows),
        passes=4, draws=19,
    )  # fmt: skip
