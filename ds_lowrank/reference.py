"""The whole method on one process, written to be read. Every layout, world size and kernel is compared with it.

It shares no code with the rest of the package: it is what the tests hold the rest against.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


class Reference:
    """Low-rank AdamW on whole matrices (GaLore, arXiv 2403.03507; SARA's selection, arXiv 2502.05790).

    Args:
        weights: name -> weight, updated in place. Those in ``ranks`` are 2-D and trained in a subspace; the others
            get plain AdamW.
        ranks: name -> r, in the model's parameter order.
        lr, betas, eps, weight_decay, scale: η, (β1, β2), ε, λ, α.
        gap, stagger, wave_size: refresh period τ; spread over it in waves of so many matrices, or all at once.
        selection: ``dominant``, ``importance``, ``uniform`` or ``random``.
        moments: ``keep`` or ``project``.
        side: ``std``, ``reverse_std``, ``right`` or ``left`` (GaLore's ``proj_type``).
        seed: key of the sampler.
        gradient_dtype: in which gradients are computed, where they come in a wider one.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        ranks: dict[str, int],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        scale: float = 0.25,
        gap: int = 200,
        stagger: bool = True,
        wave_size: int = 8,
        selection: str = "importance",
        moments: str = "keep",
        side: str = "std",
        seed: int = 0,
        gradient_dtype: torch.dtype | None = None,
    ):
        self.weights, self.lr, self.betas, self.eps = weights, lr, betas, eps
        self.weight_decay, self.scale, self.gap = weight_decay, scale, gap
        self.selection, self.moments, self.seed, self.gradient_dtype = selection, moments, seed, gradient_dtype
        self.matrices: dict[str, dict] = {}
        for name, r in ranks.items():
            m, n = weights[name].shape
            right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[side]
            self.matrices[name] = {
                "r": min(r, m, n),
                "right": right,
                "phase": 0,
                "t": 0,
                "refreshes": 0,
                "above": min(r, m, n),
            }
        if stagger:
            self.stagger(-(-len(ranks) // wave_size))
        self.plain = {name: {"t": 0} for name in weights if name not in ranks}

    def stagger(self, waves: int) -> None:
        """Wave w has the phase ⌊w τ / W⌋; of W neighbours, the costliest goes to the wave that has the least so far."""
        names, filled = list(self.matrices), [(0, wave) for wave in range(waves)]
        while names:
            neighbours, names = names[:waves], names[waves:]
            work = {}
            for name in neighbours:
                m, n = self.weights[name].shape
                work[name] = m * n * min(m, n) + 5 * min(m, n) ** 3
            filled.sort()
            for place, name in enumerate(sorted(neighbours, key=work.__getitem__, reverse=True)):  # stable
                load, wave = filled[place]
                self.matrices[name]["phase"] = wave * self.gap // waves
                filled[place] = (load + work[name], wave)

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor]) -> None:
        """One step from the averaged, clipped gradient of every weight (same shape and dtype as the weight)."""
        for name, state in self.matrices.items():
            self.step_matrix(name, self.weights[name], gradients[name], state)
        for name, state in self.plain.items():
            state["t"] += 1
            self.weights[name].mul_(1 - self.lr * self.weight_decay)
            self.weights[name].sub_(self.adam(gradients[name], state), alpha=self.lr)

    def step_matrix(self, name: str, w: Tensor, g: Tensor, state: dict) -> None:
        """R = A B;  N = Adam(R);  A ← (1 − ηλ) A − η α N Bᵀ, with A = W or Wᵀ (long × short)."""
        if not state["right"]:
            w, g = w.T, g.T
        if state["t"] == 0 or (state["t"] - state["phase"]) % self.gap == 0:
            self.refresh(name, g, state)
        if state["refreshes"] == 0:
            return  # its gradient has always been zero: unborn, no counter, no update, no decay
        state["t"] += 1
        n = self.adam(self.project(g, state), state)
        w.mul_(1 - self.lr * self.weight_decay)
        w.sub_(n @ state["basis"].T, alpha=self.lr * self.scale)

    def project(self, g: Tensor, state: dict) -> Tensor:
        """R = A B; what rounding may have made of nothing, in directions that were drawn, is nothing."""
        r = g @ state["basis"]
        own = self.noise(g) / math.sqrt(g.shape[1])
        floor = max(8 * torch.finfo(r.dtype).eps / 2, own) * g.norm(dim=1, keepdim=True)
        drawn = torch.arange(state["r"]) >= state["above"]
        return r.where((r.abs() > floor) | ~drawn, 0)

    def noise(self, g: Tensor) -> float:
        """What rounding makes of a gradient's null space, of its entries and of the sums that these are."""
        dtype = self.gradient_dtype or g.dtype
        return max(2 * torch.finfo(dtype).eps, 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps)

    def refresh(self, name: str, g: Tensor, state: dict) -> None:
        """A new basis from the gradient's spectrum; a zero or non-finite gradient keeps the old one."""
        wide, r = g.double(), state["r"]
        if not torch.isfinite(wide).all() or not wide.any():
            return
        generator = self.generator(name, state["refreshes"])
        if self.selection == "random":
            basis = self.orthonormal(torch.randn(g.shape[1], r, dtype=torch.float64, generator=generator))
        else:
            sigma, vectors = self.spectrum(wide)
            # As many directions as stand above the rounding of the Gram and of the gradient's own entries.
            floor = max(
                math.sqrt(32 * torch.finfo(torch.float64).eps) * sigma[0],
                self.noise(g) * sigma.norm() / math.sqrt(min(g.shape)),
            )
            state["above"] = above = min(r, int((sigma > floor).sum()))
            if above == r:
                state["indices"] = self.select(sigma, r, generator)
                basis = vectors[:, state["indices"]]
            else:  # all there are, and a draw among what is orthogonal to them
                state["indices"] = torch.tensor([*range(above), *[-1] * (r - above)])
                kept = vectors[:, :above]
                drawn = torch.randn(g.shape[1], r - above, dtype=torch.float64, generator=generator)
                for _ in range(2):
                    drawn = drawn - kept @ (kept.T @ drawn)
                basis = torch.cat([kept, self.orthonormal(drawn)], dim=1)
        peaks = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = (basis * peaks.sign()).to(g.dtype)  # an eigenvector's sign is free: its largest entry is positive
        if self.moments == "project" and "m" in state:
            state["m"] = state["m"] @ (state["basis"].T @ basis)
        state["basis"] = basis
        state["refreshes"] += 1

    def spectrum(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The min(long, short) singular values of A, descending, 0 where rounding hides them, and its right vectors."""
        if a.shape[0] < a.shape[1]:  # the longer side is projected: by the other Gram, with Aᵀ = Q R
            q, triangle = torch.linalg.qr(a.T)
            sigma, vectors = self.spectrum(triangle.T)
            return sigma, q @ vectors
        squares, vectors = torch.linalg.eigh(a.T @ a)  # ascending
        squares, vectors = squares.flip(0), vectors.flip(1)
        squares[squares <= 8 * torch.finfo(torch.float64).eps * squares[0]] = 0
        return squares.sqrt(), vectors

    def orthonormal(self, drawn: Tensor) -> Tensor:
        """Q of a QR whose R has a positive diagonal: uniform on the Stiefel manifold for Gaussian columns."""
        q, triangle = torch.linalg.qr(drawn)
        return q * triangle.diagonal().sign()

    def select(self, sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:
        """Kept indices, ascending: the first r, or r drawn without replacement (Gumbel's top r is that law)."""
        if self.selection == "dominant":
            return torch.arange(r)
        gumbel = -torch.log(-torch.log(torch.rand(len(sigma), dtype=torch.float64, generator=generator)))
        # `uniform`: among those above 0.
        keys = gumbel + (sigma if self.selection == "importance" else (sigma > 0).double()).log()
        return keys.sort(descending=True, stable=True).indices[:r].sort().values

    def generator(self, name: str, refresh: int) -> torch.Generator:
        """Generator keyed by (seed, parameter, refresh): the same draw on any number of ranks."""
        key = hashlib.blake2b(f"{self.seed}\0{name}\0{refresh}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)

    def adam(self, g: Tensor, state: dict) -> Tensor:
        """M̂ / (√V̂ + ε) of step ``state["t"]`` (from 1)."""
        (beta1, beta2), t = self.betas, state["t"]
        state["m"] = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", torch.zeros_like(g)) + (1 - beta2) * g * g
        return state["m"] / (1 - beta1**t) / (state["v"].sqrt() / math.sqrt(1 - beta2**t) + self.eps)
