"""Plug for transformers: its mixtures run on this project's kernels, by `moestro.hf.install()`.

    import moestro.hf

    moestro.hf.install()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moestro")
    moestro.hf.quantize(model.eval(), "int4")   # if wanted: experts packed in place
    model = moestro.hf.offload(path, memory="6GiB")   # or: experts packed in a file
    moestro.hf.check(model, inputs)             # every mixture really ran here, or an error

    balancer = moestro.hf.balance(model, switch=0.01)   # in training: even use of the experts

See docs/transformers.md and docs/balance.md. Needs the extra `hf`.
"""

from __future__ import annotations

from inspect import signature

_NEEDS = (
    "moestro.hf needs transformers with the experts interface of 5.23, which it is tested with; "
    "run `pip install --upgrade 'moestro[hf]'`"
)
try:
    from transformers.integrations.moe import use_experts_implementation
except ImportError as error:
    raise ImportError(f"{_NEEDS} ({error})") from error
# Before it had these, experts did not say how their weights lie, nor which registry they use.
if not {"experts_interface", "is_concatenated"} <= set(
    signature(use_experts_implementation).parameters
):
    raise ImportError(_NEEDS)

from moestro.hf.balance import Balance, balance  # noqa: E402
from moestro.hf.balance_callback import BalanceCallback  # noqa: E402
from moestro.hf.offload import offload, reads  # noqa: E402
from moestro.hf.packed import PackedModel, quantize  # noqa: E402
from moestro.hf.plug import NAME, Checked, Installed, check, install  # noqa: E402
from moestro.moe.balance import converted  # noqa: E402

__all__ = [
    "NAME",
    "Balance",
    "BalanceCallback",
    "Checked",
    "Installed",
    "PackedModel",
    "balance",
    "check",
    "converted",
    "install",
    "offload",
    "quantize",
    "reads",
]
