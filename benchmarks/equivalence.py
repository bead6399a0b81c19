"""Does the update depend on the number of ranks, the ZeRO stage or the precision?

    python benchmarks/equivalence.py --json out.json

Every row is a run under DeepSpeed on gloo ranks, three refreshes deep, with accumulation, clipping, weight decay and
every rank's global generator seeded differently, over shapes that partition boundaries cut mid-row and with a
1376×512 and a 512×1376 matrix. ``deviation`` is the largest ‖W − W_ref‖ / ‖W_ref − W_0‖ over all parameters of all
shapes, the one-process reference being fed the averaged, clipped gradient that DeepSpeed delivered; ``free_deviation``
the same with a reference that computes its own gradients (in bf16 it drifts with the model's rounding). The first rows
anchor the reference in galore-torch.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from cases import Case, run_case
from rank_pool import RankPool
from table import Row, json_argument, show

from ds_lowrank.reference import Reference

PARTS = (Case(), Case(shapes="thin", rank=2), Case(shapes="real", layers=1, rank=32))
BF16_OPTIMIZER: dict[str, Any] = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}
OFFLOAD: dict[str, Any] = {"zero": {"offload_optimizer": {"device": "cpu"}}}
PLAIN_COMM: dict[str, Any] = {"zero": {"contiguous_gradients": False, "overlap_comm": False}}
OVERLAP: dict[str, Any] = {"zero": {"contiguous_gradients": True, "overlap_comm": True}}

# variant -> (stage, dtypes, settings); run with importance sampling, where most can go wrong
VARIANTS: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "zero1/bf16_optimizer": (1, ("bf16",), BF16_OPTIMIZER),
    "zero1/offload": (1, ("fp32", "bf16"), OFFLOAD),
    "zero2/offload": (2, ("fp32", "bf16"), OFFLOAD),
    "zero2/plain_comm": (2, ("bf16",), PLAIN_COMM),
    "zero2/overlap": (2, ("bf16",), OVERLAP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    json_argument(parser)
    args = parser.parse_args()
    rows = [anchor_row()]
    for ranks in args.ranks:
        pool = RankPool(ranks, timeout=300)
        for layout, case in grid():
            rows.append(case_row(pool, layout, case))
            print(*rows[-1].values(), flush=True)
        pool.close()
    show(rows, "Deviation from the one-process reference, as a share of the distance moved", args.json)


def grid() -> Iterator[tuple[str, Case]]:
    """The layouts, precisions, selections and moment policies of the table."""
    for stage, dtype, selection, moments in itertools.product(
        (1, 2), ("fp32", "bf16"), ("dominant", "importance"), ("keep", "project")
    ):
        yield f"zero{stage}", Case(stage=stage, dtype=dtype, selection=selection, moments=moments)
    for layout, (stage, dtypes, settings) in VARIANTS.items():
        for dtype in dtypes:
            yield layout, Case(stage=stage, dtype=dtype, **settings)


def case_row(pool: RankPool, layout: str, case: Case) -> Row:
    """Run a case over all shapes; the worst of them is reported."""
    results = []
    for part in PARTS:
        shaped = replace(case, shapes=part.shapes, layers=part.layers, rank=part.rank)
        answers = pool.run(run_case, shaped)
        answers[0]["ranks_equal"] = all(a["ranks_equal"] and a["model_equal"] for a in answers)
        results.append(answers[0])
    return {
        "layout": layout,
        "ranks": pool.size,
        "dtype": case.dtype,
        "selection": case.selection,
        "moments": case.moments,
        "deviation": max(r["deviation"] for r in results),
        "ranks_equal": all(r["ranks_equal"] for r in results),
        "free_deviation": max(r["free_deviation"] for r in results),
        "cut": sum(r["cut"] for r in results),
        "refreshes": min(r["refreshes"] for r in results),
    }


def anchor_row(steps: int = 10, gap: int = 4, rank: int = 16) -> Row:
    """The reference beside galore-torch's GaLoreAdamW: dominant, keep, fp32; tall, wide and square.

    Both get the same gradients. LAPACK's singular vectors have arbitrary signs, which under ``keep`` decide what the
    old moments mean in the new basis, so galore-torch's are given the reference's sign convention; nothing else of it
    is touched.
    """
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    class SignFixed(GaLoreProjector):
        def get_orthogonal_matrix(self, weights, rank, type):
            basis = super().get_orthogonal_matrix(weights, rank, type)
            dim = 1 if type == "right" else 0  # it stores right bases as r × n
            peaks = basis.gather(dim, basis.abs().argmax(dim, keepdim=True))
            return basis * peaks.sign()

    torch.manual_seed(0)
    shapes = {"tall": (96, 48), "wide": (48, 96), "square": (64, 64)}
    start = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}  # as LLaMA initialises
    theirs = {name: torch.nn.Parameter(w.clone()) for name, w in start.items()}
    # GaLore adds ε before the bias correction, its paper (and we) after it: ε is made too small to matter.
    adamw: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0}
    group = {"params": list(theirs.values()), "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    galore = GaLoreAdamW([group], no_deprecation_warning=True, **adamw)
    for parameter in theirs.values():
        galore.state[parameter]["projector"] = SignFixed(rank, update_proj_gap=gap, scale=0.25)
    ours = {name: w.clone() for name, w in start.items()}
    reference = Reference(
        ours, dict.fromkeys(ours, rank), gap=gap, selection="dominant", moments="keep", stagger=False, **adamw
    )
    for _ in range(steps):
        gradients = {name: _low_noise_gradient(w.shape) for name, w in ours.items()}
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        galore.step()
        reference.step(gradients)
    return {
        "layout": "reference vs galore-torch",
        "ranks": 1,
        "dtype": "fp32",
        "selection": "dominant",
        "moments": "keep",
        "deviation": max(float((theirs[n].data - w).norm() / (w - start[n]).norm()) for n, w in ours.items()),
        "ranks_equal": True,
        "free_deviation": None,
        "cut": 0,
        "refreshes": min(s["refreshes"] for s in reference.matrices.values()),
    }


def _low_noise_gradient(shape: torch.Size) -> torch.Tensor:
    """A gradient with well-separated singular values: of equal ones no two decompositions agree on the vectors."""
    m, n = shape
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k))[0] for size in (m, n))
    return (u * torch.logspace(0, -1, k)) @ v.T


if __name__ == "__main__":
    main()
