"""Do the methods compute what the packages of their papers' authors compute?

    python benchmarks/peers.py --json out.json

fira, apollo-torch and grams-pytorch (extra ``bench``) train a tall, a wide and a square matrix on given gradients in
fp32. What stands beside a package gets the same gradients and the bases that it used, and is compared after every step:
the largest difference over 20 steps and 3 refreshes, as a share of the distance moved until then.

``settings`` are ``package``, its own ε and some decay, which only a reference with its conventions can follow, or
``neutral``, where conventions agree: ε = 1e-12 and no decay. ``limited`` counts the steps that the limiter cut.

``reference`` are the few lines of tests/unit/method_references.py; ``ds_lowrank`` is the optimizer itself, which gets
bases by a selection that is registered here. Fira's it finds too, but for the signs of columns, and these say
what moments mean once a basis changes under them.

The packages are used from outside: what a basis was is read from the optimizer's state after a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from table import Row, json_argument, show
from torch import Tensor

from ds_lowrank import LowRankAdamW
from ds_lowrank.selections import Basis, Gram, Key, Selection, register

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "unit"))
import method_references as references

STEPS, GAP = 20, 7
SHAPES = {"tall": (96, 48), "wide": (48, 96), "square": (64, 64)}
SETTINGS: dict[str, dict[str, Any]] = {
    "package": {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1},
    "neutral": {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.0},
}


@dataclass
class Case:
    """What a package did, to be repeated.

    Attributes:
        method: a key of ``PACKAGES``.
        settings: lr, eps, weight_decay.
        r, alpha: rank of the subspace, factor of the update.
        start: the weight before the first step.
        gradients: one a step.
        bases: short × r, one a refresh, every ``GAP`` steps.
        weights: the package's after every step.
    """

    method: str
    settings: dict[str, Any]
    r: int
    alpha: float
    start: Tensor
    gradients: list[Tensor]
    bases: list[Tensor]
    weights: list[Tensor]


# The packages ---------------------------------------------------------------------------------------------------------


def fira(weight: Tensor, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, int, float]:
    from fira import FiraAdamW

    group = {"params": [weight], "rank": 16, "alpha": 0.5, "update_proj_gap": GAP, "proj_type": "std"}
    return FiraAdamW([group], no_deprecation_warning=True, **settings), 16, 0.5


def apollo(weight: Tensor, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, int, float]:
    return _apollo(weight, settings, 16, "channel", 4.0)


def apollo_mini(weight: Tensor, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, int, float]:
    return _apollo(weight, settings, 1, "tensor", 128.0)


def _apollo(weight: Tensor, settings: dict[str, Any], r: int, kind: str, scale: float) -> Any:
    from apollo_torch import APOLLOAdamW

    group = {"params": [weight], "rank": r, "proj": "random", "scale_type": kind, "scale": scale}
    group |= {"update_proj_gap": GAP, "proj_type": "std"}
    return APOLLOAdamW([group], **settings), r, scale**0.5  # what its `scale` does is its root


def grams(weight: Tensor, settings: dict[str, Any]) -> tuple[torch.optim.Optimizer, int, float]:
    """It has no subspace: ours is the whole space, by its own axes."""
    from grams import Grams

    return Grams([weight], **settings), min(weight.shape), 1.0


PACKAGES: dict[str, Callable[..., tuple[torch.optim.Optimizer, int, float]]] = {
    "fira": fira,
    "apollo": apollo,
    "apollo_mini": apollo_mini,
    "grams": grams,
}
MODULES = {"fira": "fira", "apollo": "apollo_torch", "apollo_mini": "apollo_torch", "grams": "grams"}


def run_package(method: str, shape: tuple[int, int], settings: dict[str, Any], steps: int = STEPS) -> Case:
    """Train one matrix with the package; gradients grow and shrink, so that a limiter has steps to cut and to leave."""
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)  # as LLaMA initialises
    weight = torch.nn.Parameter(start.clone())
    optimizer, r, alpha = PACKAGES[method](weight, settings)
    case = Case(method, settings, r, alpha, start, [], [], [])
    for k in range(steps):
        weight.grad = (1 + k % 3) * torch.randn(shape)
        case.gradients.append(weight.grad.clone())
        optimizer.step()
        case.weights.append(weight.detach().clone())
        if k % GAP == 0:
            case.bases.append(basis_of(optimizer.state[weight], shape))
    return case


def basis_of(state: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """Short × r, as the package has it now: the right factor of a tall matrix lies transposed in its state."""
    if "projector" not in state:
        return torch.eye(min(shape))
    factor = state["projector"].ortho_matrix.detach().clone()
    return factor.T if shape[0] >= shape[1] else factor


# What stands beside them ----------------------------------------------------------------------------------------------


def run_reference(case: Case, **conventions: Any) -> tuple[list[Tensor], int]:
    """Weights after every step of tests/unit/method_references.py, and how many steps were limited."""
    method = {
        "fira": references.Fira,
        "apollo": references.Apollo,
        "apollo_mini": references.ApolloMini,
        "grams": references.Grams,
    }[case.method]
    optimizer = method(case.bases, gap=GAP, alpha=case.alpha, **conventions, **case.settings)
    weight, weights = case.start.clone(), []
    for gradient in case.gradients:
        optimizer.step(weight, gradient)
        weights.append(weight.clone())
    return weights, optimizer.state.get("limited", 0)


def reference(case: Case) -> list[Tensor]:
    """With the conventions that every rule of ours has: ε beside the corrected √V, decay before the update."""
    return run_reference(case)[0]


def peer_reference(case: Case) -> list[Tensor]:
    """With the package's conventions."""
    return run_reference(case, raw_eps=True, decay_last=case.method != "grams")[0]


@register
class Given(Selection):
    """Bases that somebody else has made."""

    name = "given"
    evidence = "none"
    bases: ClassVar[list[Tensor]] = []  # one a refresh

    def draw(
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis:
        vectors = self.bases[key.refresh].to(device, dtype)
        return Basis(vectors.contiguous(), torch.full((r,), -1, dtype=torch.int32))


def ours(case: Case) -> list[Tensor]:
    """The optimizer, on the package's bases."""
    return run_ours(case, Given.name)


def run_ours(case: Case, selection: str) -> list[Tensor]:
    """Weights after every step of the optimizer."""
    Given.bases = case.bases
    weight = torch.nn.Parameter(case.start.clone())
    group = {"params": [("w", weight)], "rank": case.r, "update_proj_gap": GAP, "scale": case.alpha}
    options: dict[str, Any] = {"rule": case.method, "selection": selection, "stagger": False, "gram_dtype": "float64"}
    optimizer = LowRankAdamW([group], **options, **case.settings)
    weights = []
    for gradient in case.gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        weights.append(weight.detach().clone())
    return weights


# A column a function: it repeats a case and answers with its weights after every step. Under the package's own settings
# only what has the package's conventions can agree.
COLUMNS: dict[str, dict[str, Callable[[Case], list[Tensor]]]] = {
    "package": {"reference": peer_reference},
    "neutral": {"reference": reference, "ds_lowrank": ours},
}


# Rows -----------------------------------------------------------------------------------------------------------------


def difference(case: Case, weights: list[Tensor]) -> float:
    """The largest distance to the package's weights after a step, as a share of the distance that those moved."""
    return max(
        float((ours - theirs).norm() / (theirs - case.start).norm()) for ours, theirs in zip(weights, case.weights)
    )


def row(method: str, shape: str, settings: str) -> Row:
    """The differences of one method, shape and kind of settings; a column that does not apply is None."""
    case = run_package(method, SHAPES[shape], SETTINGS[settings])
    names = dict.fromkeys(name for columns in COLUMNS.values() for name in columns)
    found = {name: difference(case, run(case)) for name, run in COLUMNS[settings].items()}
    return {
        "method": method,
        "shape": shape,
        "settings": settings,
        "r": case.r,
        "refreshes": len(case.bases),
        "limited": run_reference(case)[1],
        **{name: found.get(name) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    json_argument(parser)
    args = parser.parse_args()
    rows = [row(method, shape, settings) for method in PACKAGES for settings in SETTINGS for shape in SHAPES]
    title = f"Difference from the package, as a share of the distance moved: fp32, {STEPS} steps"
    show(rows, title, args.json)


if __name__ == "__main__":
    main()
