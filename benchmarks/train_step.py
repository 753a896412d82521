"""Training tokens per second: our mixture, its dense twin, and transformers' Mixtral of one shape.

6 layers, D 256, 8 experts, K 2, F 512, bytes, 16 sequences of 256 tokens; forward, loss, backward,
clipping and AdamW; one process, the models taking turns, each step on its own batch of real text.
Needs `pip install 'moestro[hf]'` for the comparison.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch.nn import functional as F

from moestro.config import BalanceConfig, ModelConfig
from moestro.models.decoder import Decoder
from moestro.models.twin import dense_twin
from moestro.moe import balance
from moestro.train.memory import keep_freed_memory

BATCH, LENGTH = 16, 256
CONFIG = ModelConfig(
    dim=256, num_layers=6, moe={"hidden_dim": 512, "num_experts": 8, "top_k": 2},
    attention={"num_heads": 8}, head={"tied": False},
)  # fmt: skip


def batches() -> Callable[[], torch.Tensor]:
    """Random windows of this Python's own library, the same sequence for every caller."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    bytes_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        starts = torch.randint(len(bytes_N) - LENGTH - 1, (BATCH,), generator=generator)
        return torch.stack([bytes_N[s : s + LENGTH + 1] for s in starts]).long()

    return draw


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)


def step_of(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    """One training step as a function; every model gets the same treatment."""
    draw, adam = batches(), optimizer(model)

    def step() -> None:
        ids_BS = draw()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids_BS)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if norm > 1.0:  # as the trainer does
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        adam.step()
        adam.zero_grad()

    return step


def ours(cfg: ModelConfig) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    torch.manual_seed(0)
    model = Decoder(cfg)
    weights = BalanceConfig()

    def loss_of(ids_BS: torch.Tensor) -> torch.Tensor:
        output = model(ids_BS[:, :-1])
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), ids_BS[:, 1:].flatten())
        for routing in output.routings:
            loss = loss + weights.switch * balance.switch_loss(routing)
            loss = loss + weights.z * balance.z_loss(routing)
        return loss

    return model, loss_of


def mixtral() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    assert CONFIG.moe is not None
    torch.manual_seed(0)
    cfg = MixtralConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.moe.hidden_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.attention.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        num_local_experts=CONFIG.moe.num_experts,
        num_experts_per_tok=CONFIG.moe.top_k,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
        use_cache=False,
    )
    model = MixtralForCausalLM._from_config(cfg, experts_implementation="grouped_mm")
    model.train()

    def loss_of(ids_BS: torch.Tensor) -> torch.Tensor:
        # Given labels it shifts by itself; the last byte is fed too, one token more of 256.
        loss: torch.Tensor = model(input_ids=ids_BS[:, :-1], labels=ids_BS[:, :-1]).loss
        return loss

    return model, loss_of


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=7)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()  # as `moestro train` does; it serves every model here alike
    dtype = getattr(torch, args.dtype)
    models = {"moestro MoE": ours(CONFIG), "dense twin": ours(dense_twin(CONFIG))}
    if not args.without_transformers:
        models["transformers Mixtral grouped_mm"] = mixtral()
    steps = {name: step_of(*pair, dtype) for name, pair in models.items()}
    seconds = measure.interleave(steps, args.repeats, args.warmup)
    rows = [
        {
            "model": name,
            "dtype": args.dtype,
            "parameters": sum(p.numel() for p in models[name][0].parameters()),
            "tokens_per_s": BATCH * LENGTH / statistics.median(times),
            "s_per_step": statistics.median(times),
            "min_s": min(times),
            "max_s": max(times),
        }
        for name, times in seconds.items()
    ]
    moe = seconds["moestro MoE"]
    claims = {"MoE tokens/s over dense twin's": measure.ratio(seconds["dense twin"], moe)}
    if not args.without_transformers:
        theirs = seconds["transformers Mixtral grouped_mm"]
        claims["MoE tokens/s over transformers'"] = measure.ratio(theirs, moe)
    measure.report(f"train_step_{args.dtype}{args.name}", rows, claims)


if __name__ == "__main__":
    main()
