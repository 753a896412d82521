"""transformers' own tensor and expert parallelism on two gloo ranks, against one process.

    .venv/bin/python benchmarks/transformers_parallel.py              # also results/…json
    .venv/bin/python benchmarks/transformers_parallel.py --only Mixtral GptOss

Each family of tests/probe/foreign_zoo.py, tiny: tensor parallel ("tp"), the same with whole experts
on each rank ("tp+ep"), and sharded parameters with experts exchanging tokens ("all_to_all"). The
loss, every gradient and their norm are compared; a rank that waits is ended after `TIME_S`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from moestro.check.compare import difference, tolerance

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the table of families of the tests
from tests.probe import foreign_zoo

MODES: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2},
    "tp+ep": {"tp_size": 2, "ep_size": 2},
    "all_to_all": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
}
RANKS, TIME_S, TOKENS = 2, 180, (2, 12)
# Widths that two ranks can share.
FITTING = {"moe_intermediate_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}


def one_rank(rank: int, family: str, mode: str, folder: str) -> None:
    """What rank 0 finds is left in the folder; an exception of any rank too."""
    out = Path(folder) / f"{rank}.json"
    try:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timedelta(seconds=TIME_S), RANKS, rank
        )
        out.write_text(json.dumps(compared(rank, family, mode, Path(folder) / "model")))
    except Exception as error:  # whatever transformers refuses, in its own words
        first = str(error).strip().split("\n")[0][:300]
        out.write_text(json.dumps({"raised": f"{type(error).__name__}: {first}"}))
    os._exit(0)  # nobody waits for the other rank's end


def compared(rank: int, family: str, mode: str, folder: Path) -> dict[str, Any]:
    """Largest relative difference of loss, gradients and norm."""
    torch.manual_seed(0)
    foreign_zoo.SIZES.update(FITTING)
    whole = foreign_zoo.build(family).float().train()
    if rank == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(**MODES[mode])
    kind = getattr(transformers, family)
    model = kind.from_pretrained(folder, distributed_config=config, dtype=torch.float32).train()
    torch.manual_seed(1)
    ids = torch.randint(3, foreign_zoo.VOCABULARY, TOKENS)
    apart = "fsdp_size" in MODES[mode]  # each rank has its own part of the batch
    part = ids[rank::RANKS] if apart else ids
    loss, exact = (each(one, labels=one).loss for each, one in ((model, part), (whole, ids)))
    torch.autograd.backward(loss)
    torch.autograd.backward(exact)
    said = _full(loss.detach()).clone()
    if apart:
        dist.all_reduce(said)
        said /= RANKS
    found = [difference("the loss", said, exact.detach().double())]
    meant = {name: each.grad for name, each in whole.named_parameters() if each.grad is not None}
    size = torch.stack([each.norm() for each in meant.values()]).square().mean().sqrt()
    for name, each in model.named_parameters():
        if name in meant:
            got = None if each.grad is None else _full(each.grad)
            ours = _mine(meant[name], got, rank)
            found.append(difference(f"the gradient of {name}", got, ours, 0.1 * float(size)))
    worst = max(found, key=lambda each: each.relative)
    return {
        "worst": worst.name, "relative": worst.relative, "words": worst.sentence,
        "gradients": len(found) - 1, "norm": _norm(model, meant),
    }  # fmt: skip


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mine(exact: Tensor, got: Tensor | None, rank: int) -> Tensor:
    """The whole, or this rank's share where that is what the parameter is."""
    if got is None or got.shape == exact.shape:
        return exact.double()
    axis = next(axis for axis, size in enumerate(exact.shape) if got.shape[axis] != size)
    return exact.narrow(axis, rank * got.shape[axis], got.shape[axis]).double()


def _norm(model: nn.Module, meant: dict[str, Tensor]) -> float | str:
    """The norm that its Trainer clips by, over the whole's; or what it raises."""
    trainer: Any = transformers.Trainer
    try:
        norm = trainer._mixed_mesh_grad_norm(None, model, float("inf"))
        return float(_full(norm) / nn.utils.get_total_norm(meant.values()))
    except Exception as error:  # of anybody's tensors
        return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"


def row(family: str, mode: str) -> dict[str, Any]:
    """One family in one mode: two forks of this process."""
    context, start = multiprocessing.get_context("fork"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=one_rank, args=(rank, family, mode, folder))
                 for rank in range(RANKS)]  # fmt: skip
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(TIME_S)
            each.kill()
        said = [Path(folder) / f"{rank}.json" for rank in range(RANKS)]
        texts = [each.read_text() if each.exists() else "" for each in said]
    found = [json.loads(each) if each else {"raised": f"no end after {TIME_S} s"} for each in texts]
    bad = next((each for each in found if "raised" in each), found[0])
    return {"name": family, "mode": mode, "seconds": round(time.perf_counter() - start, 1), **bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="names that contain one of these")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "transformers_parallel.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    allowed, rows = tolerance(torch.float32, 1000), []
    for family in foreign_zoo.FAMILIES:
        wanted = any(each.lower() in family.lower() for each in arguments.only)
        if not (wanted and family.endswith("ForCausalLM")):
            continue
        for mode in MODES:
            rows.append(found := row(family, mode))
            right = "raised" not in found and found["relative"] <= allowed
            words = found.get("raised") or f"{found['relative']:.1e} {found['worst']}"
            norm = found.get("norm", "")
            norm = f"norm {norm:.4f}" if isinstance(norm, float) else norm
            print(f"{family:30} {mode:10} {'✓' if right else '✗'} {words}; {norm}", flush=True)
    result = {"machine": measure.machine(), "allowed": allowed, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
