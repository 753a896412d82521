"""What recording the routing costs, as a share of the forward passes that it looks at.

One call of `moestro.probe.record` against the same forward passes alone, taking turns, on
the 1.7B shape of mixture_1.7b.toml in bfloat16: this project's Decoder, and a Mixtral of
transformers with the same numbers. Recording includes everything: finding the routers, the
fingerprint of the weights, padding, reducing and joining.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

from moestro import Decoder, ModelConfig
from moestro.models.count import count
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record
from moestro.settings import load_settings

SHAPE = Path(__file__).with_name("mixture_1.7b.toml")
TARGET = 1.02


def theirs(cfg: ModelConfig) -> Any:
    """A Mixtral of the same shape, with the experts that transformers chooses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        assert cfg.moe is not None
        config = transformers.MixtralConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.dim,
            intermediate_size=cfg.moe.hidden_dim,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.attention.num_heads,
            num_key_value_heads=cfg.attention.num_kv_heads,
            num_local_experts=cfg.moe.num_experts,
            num_experts_per_tok=cfg.moe.top_k,
            max_position_embeddings=cfg.attention.context,
            sliding_window=None,
        )
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.MixtralForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def variants(
    model: Any, tokens_NS: torch.Tensor, batch_size: int
) -> dict[str, Callable[[], object]]:
    """The forward passes alone, and recorded."""
    device = next(model.parameters()).device
    passages = [Passage(tokens_S) for tokens_S in tokens_NS]
    own = isinstance(model, Decoder)

    def forward() -> None:
        with torch.inference_mode() if own else torch.no_grad():
            for tokens_BS in tokens_NS.split(batch_size):
                if own:
                    model(tokens_BS.to(device))
                else:
                    model(input_ids=tokens_BS.to(device), use_cache=False)

    def recorded() -> None:
        record(model, passages, batch_size=batch_size)

    return {"forward": forward, "recorded": recorded}


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=9)
    parser.set_defaults(warmup=2)
    parser.add_argument("--batches", type=int, default=2, help="forward passes of a turn")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], help="change the shape, as a.b=c")
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = load_settings(ModelConfig, SHAPE, args.set)
    tokens_NS = torch.randint(cfg.vocab_size, (args.batches * args.batch_size, args.length))
    rows: list[dict[str, Any]] = []
    claims: dict[str, Any] = {
        "parameters": count(cfg).total,
        "tokens of a forward pass": args.batch_size * args.length,
        "forward passes of a turn": args.batches,
        "allowed": TARGET,
    }
    makers: dict[str, Callable[[], Any]] = {
        "moestro": lambda: Decoder(cfg).to(torch.bfloat16).eval(),
        "transformers": lambda: theirs(cfg),
    }
    for name, make in makers.items():
        model = make().to(args.device)
        runs = variants(model, tokens_NS, args.batch_size)
        seconds = measure.interleave(runs, args.repeats, args.warmup)
        over = measure.ratio(seconds["recorded"], seconds["forward"])
        for kind, times in seconds.items():
            rows.append(
                {
                    "model": name,
                    "what": kind,
                    "seconds": statistics.median(times),
                    "over forward": over if kind == "recorded" else 1.0,
                }
            )
        claims[f"{name}: recorded / forward"] = over
        del model, runs
    measure.report(f"probe_overhead{args.name}", rows, claims)


if __name__ == "__main__":
    main()
