"""Does the update depend on the layout, the number of ranks or the precision?

    python benchmarks/equivalence.py --json out.json

Every row is a run on gloo ranks, three refreshes deep or more, with accumulation, clipping, weight decay and every
rank's global generator seeded differently, over tall, wide, square and stacked matrices, with fewer rows than ranks,
uneven, cut mid-row by the boundaries between ranks, and with a 1376×512 and a 512×1376 matrix (without accumulation).
``deviation`` is the largest
‖W − W_ref‖ / ‖W_ref − W_0‖ over all parameters of all shapes, the one-process reference being fed the averaged, clipped
gradient that the framework delivered; ``free_deviation`` the same with a reference that computes its own gradients, for
matrices with sides up to 64, ``free_real`` for the large ones (in bf16 both drift with the model's rounding).
``basis_deviation`` is the largest ‖B − B_ref‖_F / √r. ``ranks_equal``: indices, counters and bases equal on all ranks
that use them, indices equal to the reference's, weights bitwise equal wherever ranks hold the same, and equal to what
the model computes with. The first row anchors the reference in galore-torch.

``--rows deficient``: gradients with fewer directions than r, the same few on all ranks in a step, others in the next
(a batch of two rows, and of one); of stacked experts the first has no tokens at all, so its matrix is never refreshed.

``--rows methods``: the other rules and selections, on 2 and 3 ranks, all small shapes in one model; the large ones in
fp32 and fp64 on 3 ranks. ``online_pca`` has one refresh and then steps its basis, which nothing brings back to the
reference's: ``basis_deviation`` is that of the whole run. With int8 states the reference rounds what it keeps; where
its last bit tips a number over to the next code, an entry differs by a code.

``--rows projected``: ``gradients="projected"``. The reference is given the own gradients of every rank and micro-batch,
which each rank makes with a whole model of its own, and rounds R and N where they are sent; ``norm_deviation`` is that
of the norms by which gradients are clipped, in every step where they are. ``to_full`` is the distance to the weights of
``gradients="full"``, where the bases are the same: without accumulation and clip. DeepSpeed's bf16 matrices have no
master copy then, and what their rounding to nearest loses is in the figure: fp32 rows show the arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import Case, run_case
from harness import LAYOUTS
from projected_cases import run_projected
from rank_pool import RankPool
from table import Row, json_argument, show

from ds_lowrank.reference import Reference

SMALL = (Case(), Case(shapes="thin", rank=2), Case(shapes="experts", rank=3))
LARGE: dict[str, Any] = {"shapes": "real", "layers": 1, "rank": 32, "steps": 6, "gap": 2, "accumulation": 1}
BF16_OPTIMIZER: dict[str, Any] = {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}
PLAIN_COMM: dict[str, Any] = {"zero": {"contiguous_gradients": False, "overlap_comm": False}}
OVERLAP: dict[str, Any] = {"zero": {"contiguous_gradients": True, "overlap_comm": True}}

# variant -> (layout, dtypes, settings); run with importance sampling, where most can go wrong
VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "bf16_optimizer": ("zero1", ("bf16",), BF16_OPTIMIZER),
    "offload": ("zero1", ("fp32", "bf16"), {"offload": True}),
    "offload ": ("zero2", ("fp32", "bf16"), {"offload": True}),
    "plain_comm": ("zero2", ("bf16",), PLAIN_COMM),
    "overlap": ("zero2", ("bf16",), OVERLAP),
    " offload": ("zero3", ("fp32", "bf16"), {"offload": True}),
    "whole bases": ("zero3", ("fp32",), {"shard_projection": False}),
    "whole bases ": ("fsdp2", ("fp32",), {"shard_projection": False}),
}

# (rule, selection, carry): every new rule and selection; r = 1 is apollo_mini's own.
METHODS = (
    ("grams", "importance", "project"),
    ("fira", "dominant", "keep"),
    ("fira", "importance", "project"),
    ("apollo", "gaussian", "keep"),
    ("apollo", "random", "project"),
    ("apollo_mini", "gaussian", "keep"),
    ("adamw", "online_pca", "keep"),
    ("apollo_mini", "online_pca", "keep"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 to 4; of methods 2 and 3")
    json_argument(parser)
    parser.add_argument("--rows", choices=list(GRIDS), default="full", help="which table")
    parser.add_argument("--selection", help="only its rows")
    args = parser.parse_args()
    cases, what, all_ranks = GRIDS[args.rows]
    rows = [anchor_row()] if args.rows == "full" else []
    for ranks in args.ranks or all_ranks:
        pool = RankPool(ranks, timeout=300)
        for variant, case in cases(ranks):
            if args.selection not in (None, case.selection):
                continue
            row = {"methods": method_row, "projected": projected_row}.get(args.rows, case_row)
            rows.append(row(pool, variant, case))
            print(*rows[-1].values(), flush=True)
        pool.close()
    show(rows, f"Deviation from the one-process reference, as a share of the distance moved{what}", args.json)


def grid(ranks: int) -> Iterator[tuple[str, Case]]:
    """The layouts, precisions, selections and moment policies of the table: (variant, case)."""
    for layout in LAYOUTS:
        if layout == "one" and ranks > 1:
            continue
        for dtype in ("fp32", "bf16") if layout.startswith("zero") else ("fp64", "fp32", "bf16"):
            for selection, moments in (("importance", "keep"), ("dominant", "project")):
                yield "", Case(layout=layout, dtype=dtype, selection=selection, moments=moments)
    for variant, (layout, dtypes, settings) in VARIANTS.items():
        for dtype in dtypes:
            yield variant.strip(), Case(layout=layout, dtype=dtype, **settings)


def deficient_grid(ranks: int) -> Iterator[tuple[str, Case]]:
    """Rank-deficient gradients: the same layouts and precisions. Every selection keeps all directions there are."""
    for layout in LAYOUTS:
        if layout == "one" and ranks > 1:
            continue
        for dtype in ("fp32", "bf16") if layout.startswith("zero") else ("fp64", "fp32", "bf16"):
            for variant, directions in (("two rows", 2), ("one row", 1)):
                yield variant, Case(layout=layout, dtype=dtype, directions=directions)


def methods_grid(ranks: int) -> Iterator[tuple[str, Case]]:
    """Every method under every layout of several ranks; some of them with int8 states, in bf16, in fp64."""
    for rule, selection, carry in METHODS:
        for layout in ("ddp", "zero2", "zero3", "fsdp2"):
            yield "", Case(layout=layout, rule=rule, selection=selection, moments=carry)
    for rule, selection, carry in METHODS:
        for layout in ("zero2", "fsdp2") if ranks == 2 else ("zero3",):
            method = Case(layout=layout, rule=rule, selection=selection, moments=carry)
            yield "int8 states", replace(method, state_dtype="int8")
            yield "", replace(method, dtype="bf16")
        if ranks == 3:
            yield "", Case(layout="fsdp2", dtype="fp64", rule=rule, selection=selection, moments=carry)


def projected_grid(ranks: int) -> Iterator[tuple[str, Case]]:
    """Projected gradients under every layout, accumulated and not, clipped and not."""
    for layout in LAYOUTS:
        if layout == "one" and ranks > 1:
            continue
        for dtype in ("fp32", "bf16") if layout.startswith("zero") else ("fp64", "fp32", "bf16"):
            for accumulation in (1, 4):
                for clip in (0.0, 0.3):
                    yield (
                        "",
                        Case(layout=layout, dtype=dtype, gradients="projected", accumulation=accumulation, clip=clip),
                    )


# --rows -> its cases, what it is called, on how many ranks.
GRIDS: dict[str, tuple[Callable[[int], Iterator[tuple[str, Case]]], str, tuple[int, ...]]] = {
    "full": (grid, "", (1, 2, 3, 4)),
    "deficient": (deficient_grid, ": gradients with fewer directions than r", (1, 2, 3, 4)),
    "methods": (methods_grid, ": methods", (2, 3)),
    "projected": (projected_grid, ": projected gradients", (1, 2, 3, 4)),
}


def case_row(pool: RankPool, variant: str, case: Case) -> Row:
    """Run a case over all shapes; the worst of them is reported."""
    small = [_worst_rank(pool, replace(case, shapes=p.shapes, layers=p.layers, rank=p.rank)) for p in SMALL]
    if case.layout in ("fsdp2", "hsdp"):
        small.append(_worst_rank(pool, replace(case, shapes="columns", wide_on_columns=True)))
    return _row(pool, variant, case, small, _worst_rank(pool, replace(case, **LARGE)))


def method_row(pool: RankPool, variant: str, case: Case) -> Row:
    """The same in fewer runs."""
    case = replace(case, layers=1, gap=3, steps=7)
    r: dict[str, Any] = {"rank": 1} if case.rule == "apollo_mini" else {}
    small = [_worst_rank(pool, replace(case, shapes="mixed", **{"rank": 3, **r}))]
    if case.layout in ("fsdp2", "hsdp"):
        small.append(_worst_rank(pool, replace(case, shapes="columns", wide_on_columns=True, **r)))
    large = not variant and pool.size == 3 and case.dtype != "bf16"
    return _row(pool, variant, case, small, _worst_rank(pool, replace(case, **{**LARGE, **r})) if large else None)


def projected_row(pool: RankPool, variant: str, case: Case) -> Row:
    """All small shapes in one model, and the large ones where the dtype has the digits."""
    case = replace(case, layers=1, gap=3, steps=7)
    alike = case.accumulation == 1 and not case.clip
    cases = [replace(case, shapes="mixed", rank=3)]
    if case.dtype != "bf16" and alike:
        cases.append(replace(case, **{**LARGE, "accumulation": 1}))
    results = []
    for one in cases:
        answers = pool.run(run_projected, one, with_full=alike)
        first = answers[0]
        first["ranks_equal"] = all(a["ranks_equal"] and a["replicas_equal"] and a["model_equal"] for a in answers)
        results.append(first)
    return {
        "layout": case.layout,
        "ranks": pool.size,
        "dtype": case.dtype,
        "accumulation": case.accumulation,
        "clip": case.clip,
        "deviation": max(r["deviation"] for r in results),
        "basis_deviation": max(r["basis_deviation"] for r in results),
        "norm_deviation": max(r["norm_deviation"] for r in results) if case.clip else None,
        "ranks_equal": all(r["ranks_equal"] for r in results),
        "clipped": min(r["clipped"] for r in results),
        "to_full": max(r["to_full"] for r in results) if alike else None,
    }


def _row(pool: RankPool, variant: str, case: Case, small: Sequence[dict[str, Any]], real: dict[str, Any] | None) -> Row:
    results = [*small, *([] if real is None else [real])]
    return {
        "layout": case.layout,
        "variant": variant,
        "ranks": pool.size,
        "dtype": case.dtype,
        "rule": case.rule,
        "selection": case.selection,
        "carry": case.moments,
        "deviation": max(r["deviation"] for r in results),
        "basis_deviation": max(r["basis_deviation"] for r in results),
        "ranks_equal": all(r["ranks_equal"] for r in results),
        "free_deviation": max(r["free_deviation"] for r in small),
        "free_real": None if real is None else real["free_deviation"],
        "shared": sum(r["shared"] for r in results),
        "moved": sum(r["moved"] for r in results),
        # Without the experts where one of them never has a gradient.
        "refreshes": min(r["refreshes"] for r in results if r["refreshes"]),
    }


def _worst_rank(pool: RankPool, case: Case) -> dict[str, Any]:
    answers = pool.run(run_case, case)
    first = answers[0]
    first["ranks_equal"] = all(a["ranks_equal"] and a["replicas_equal"] and a["model_equal"] for a in answers)
    return first


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
        "layout": "one",
        "variant": "reference vs galore-torch",
        "ranks": 1,
        "dtype": "fp32",
        "rule": "adamw",
        "selection": "dominant",
        "carry": "keep",
        "deviation": max(float((theirs[n].data - w).norm() / (w - start[n]).norm()) for n, w in ours.items()),
        "basis_deviation": None,
        "ranks_equal": True,
        "free_deviation": None,
        "free_real": None,
        "shared": 0,
        "moved": 0,
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
