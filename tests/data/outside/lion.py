"""Lion (arXiv 2302.06675) in the subspace: the sign of a mean moves, so that every entry of R steps by one size."""

from collections.abc import MutableMapping

from torch import Tensor

from ds_lowrank.rules import Hyper, Rule, Stack, Update, register
from ds_lowrank.states.layout import Slot


@register
class Lion(Rule):
    """N = sign(β1 M + (1 − β1) R), then M ← β2 M + (1 − β2) R."""

    name = "lion"
    slots = (Slot("momentum", turns="linear"),)
    copies = 1

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update:
        beta1, beta2 = hyper.betas
        m = state["momentum"]
        n = m.lerp(r, 1 - beta1).sign_()
        m.lerp_(r, 1 - beta2)
        return Update(n)
