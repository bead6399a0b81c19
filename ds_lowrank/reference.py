"""The whole method on one process, written to be read. Every layout, world size and kernel is compared with it.

It shares no code with the rest of the package: it is what the tests hold the rest against.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor


class Reference:
    """Low-rank optimizers on whole matrices: GaLore (arXiv 2403.03507), SARA (2502.05790) and those of docs/methods.md.

    Args:
        weights: name -> weight, updated in place. Those in ``ranks`` are 2-D and trained in a subspace; the others
            get plain AdamW.
        ranks: name -> r, in the model's parameter order.
        lr, betas, eps, weight_decay, scale: η, (β1, β2), ε, λ, α.
        gap, stagger, wave_size: refresh period τ; spread over it in waves of so many matrices, or all at once.
        rule: ``adamw``, ``grams``, ``fira``, ``apollo`` or ``apollo_mini``, with ``limiter`` γ of the last three.
        selection: ``dominant``, ``importance``, ``uniform``, ``random``, ``gaussian`` or ``online_pca``, with ``pca``:
            learning rate as a multiple of η, penalty, β1, β2 and ε of the last.
        gaussian: the numbers of ``gaussian``, which a hash makes: (key, short, r) -> short × r.
        moments: ``keep`` or ``project``.
        side: ``std``, ``reverse_std``, ``right`` or ``left`` (GaLore's ``proj_type``).
        seed: key of the sampler.
        gradient_dtype: in which gradients are computed, where they come in a wider one.
        wire: with :meth:`add`, dtype to which R is rounded where it is sent, and with ``replicas`` > 1 N too.
        replicas: ranks that hold every weight whole.
        copies: ranks of each copy of the model.
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
        rule: str = "adamw",
        limiter: float = 1.01,
        selection: str = "importance",
        pca: tuple[float, float, float, float, float] = (5.0, 0.1, 0.9, 0.999, 1e-8),
        gaussian: Callable[[int, int, int], Tensor] | None = None,
        moments: str = "keep",
        side: str = "std",
        seed: int = 0,
        gradient_dtype: torch.dtype | None = None,
        wire: torch.dtype | None = None,
        replicas: int = 1,
        copies: tuple[tuple[int, ...], ...] = ((0,),),
    ):
        self.weights, self.lr, self.betas, self.eps = weights, lr, betas, eps
        self.weight_decay, self.scale, self.gap = weight_decay, scale, gap
        self.rule, self.limiter, self.pca, self.gaussian = rule, limiter, pca, gaussian
        self.selection, self.moments, self.seed, self.gradient_dtype = selection, moments, seed, gradient_dtype
        self.wire, self.replicas, self.copies = wire, replicas, copies
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
        self.plain: dict[str, dict] = {name: {"t": 0} for name in weights if name not in ranks}

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

    @torch.no_grad()
    def add(self, local: list[dict[str, Tensor]], syncs: bool = True) -> None:
        """One micro-batch of ``gradients="projected"``: from every rank its own gradient of every weight.

        What is stored and sent is R = ∇A B of each rank. A matrix that is due gets its basis from the first averaged
        gradient of the step that is not zero, and of that one R is taken after averaging. Where a micro-batch does not
        sync, ranks keep what they have and send it with the next.
        """
        for name, state in self.matrices.items():
            tall = [g[name] if state["right"] else g[name].T for g in local]
            mean = self.mean(tall)
            if self.due(state) and not state.get("found") and torch.isfinite(mean).all() and mean.any():
                state["before"] = dict(state)
                self.refresh(name, mean, state)
                state["found"] = True
                if self.selection in ("dominant", "importance", "uniform"):
                    r = self.project(mean, state)
                    state["sum"] = r if state.get("sum") is None else state["sum"] + r
                    continue
            if state["refreshes"]:
                own = [self.project(g, state) for g in tall]
                state["own"] = [a + b for a, b in zip(state["own"], own)] if state.get("own") else own
                if syncs:
                    self.send(state)
        for name, state in self.plain.items():
            g = torch.stack([g[name] for g in local]).mean(0)
            state["sum"] = g if state.get("sum") is None else state["sum"] + g

    def send(self, state: dict) -> None:
        """Add what ranks have kept to what is stepped."""
        own = state.pop("own", None)
        if own is not None:
            state["sum"] = self.mean(own) if state.get("sum") is None else state["sum"] + self.mean(own)

    def mean(self, of_ranks: list[Tensor]) -> Tensor:
        """What is sent is rounded, what is added up is not; the sum of each copy of the model is sent once more."""
        sums = [torch.stack([self.sent(of_ranks[k]) for k in copy]).sum(0) for copy in self.copies]
        return (sums[0] if len(sums) == 1 else torch.stack([self.sent(s) for s in sums]).sum(0)) / len(of_ranks)

    def sent(self, x: Tensor) -> Tensor:
        """As it arrives."""
        return x if self.wire is None else x.to(self.wire).to(x)

    def norm(self) -> float:
        """√(Σ ‖R‖² + Σ ‖g‖²), g of what is not projected."""
        for state in self.matrices.values():
            self.send(state)
        sums = [state["sum"] for state in (*self.matrices.values(), *self.plain.values()) if "sum" in state]
        return math.sqrt(sum(float(s.double().square().sum()) for s in sums))

    def drop(self) -> None:
        """Forget what was added: bases are as they were."""
        for state in self.matrices.values():
            before = state.pop("before", state)
            for key in ("sum", "own", "found"):
                state.pop(key, None)
            state.update(before)
        for state in self.plain.values():
            state.pop("sum", None)

    @torch.no_grad()
    def step_added(self, factor: float = 1.0) -> None:
        """One step from what was added, times a factor."""
        for name, state in self.matrices.items():
            self.send(state)
            r = state.pop("sum", None)
            state.pop("before", None), state.pop("found", None)
            if state["refreshes"]:
                w = self.weights[name] if state["right"] else self.weights[name].T
                r = torch.zeros(w.shape[0], state["r"], dtype=w.dtype) if r is None else factor * r
                state["t"] += 1
                n = self.adam(r, state)
                if self.rule == "grams":
                    n = n.abs() * r.sign()
                n = self.sent(n) if self.replicas > 1 else n
                w.mul_(1 - self.lr * self.weight_decay)
                w.sub_(self.scale * n @ state["basis"].T, alpha=self.lr)
        for name, state in self.plain.items():
            state["t"] += 1
            self.weights[name].mul_(1 - self.lr * self.weight_decay)
            self.weights[name].sub_(self.adam(factor * state.pop("sum"), state), alpha=self.lr)

    def due(self, state: dict) -> bool:
        """Whether a matrix gets a new basis before its next step."""
        periodic = self.selection != "online_pca"
        return state["t"] == 0 or (periodic and (state["t"] - state["phase"]) % self.gap == 0)

    def step_matrix(self, name: str, w: Tensor, g: Tensor, state: dict) -> None:
        """A ← (1 − ηλ) A − η U, with A = W or Wᵀ (long × short) and U of R = ∇A B."""
        if not state["right"]:
            w, g = w.T, g.T
        if self.due(state):
            self.refresh(name, g, state)
        if state["refreshes"] == 0:
            return  # its gradient has always been zero: no counter, no update, no decay
        state["t"] += 1
        update = self.update(g, self.project(g, state), state)
        w.mul_(1 - self.lr * self.weight_decay)
        w.sub_(update, alpha=self.lr)
        if self.selection == "online_pca" and torch.isfinite(g).all() and g.any():
            self.refine(g, state)

    def update(self, g: Tensor, r: Tensor, state: dict) -> Tensor:
        """U = α N Bᵀ with N of Adam; what Fira and APOLLO scale is φ ⊙ X, φ = |N| / |R| before bias correction."""
        (beta1, beta2), t, basis = self.betas, state["t"], state["basis"]
        n = self.adam(r, state)
        if self.rule == "adamw":
            return self.scale * n @ basis.T
        if self.rule == "grams":
            return self.scale * (n.abs() * r.sign()) @ basis.T
        correction = math.sqrt(1 - beta2**t) / (1 - beta1**t)
        if self.rule == "apollo_mini":
            phi = n.double().norm().to(n) / correction / (r.double().norm().to(r) + 1e-8)
        else:
            phi = n.norm(dim=1, keepdim=True) / correction / (r.norm(dim=1, keepdim=True) + 1e-8)
        if self.rule == "fira":
            residual = g - self.scale * r @ basis.T
            return self.scale * n @ basis.T + correction * self.limited(phi * residual, state)
        return self.scale * correction * self.limited(phi * g, state)

    def limited(self, s: Tensor, state: dict) -> Tensor:
        """S, scaled down where its norm is more than γ times that of the last step; a zero is not remembered."""
        norm = float(s.double().norm())  # one float32 sum of all elements is off by 1e-5 at real sizes
        if norm == 0:
            return s
        factor = min(1.0, self.limiter * (state["norm"] + 1e-8) / norm) if "norm" in state else 1.0
        state["norm"] = factor * norm
        return s * factor

    def refine(self, g: Tensor, state: dict) -> None:
        """Online Subspace Descent (2408.12857): a step of Adam on L(B) = ‖G̃ − G̃BBᵀ‖² + λ‖BᵀB − I‖², G̃ = ∇A / ‖∇A‖."""
        factor, penalty, beta1, beta2, eps = self.pca
        b, t, lr = state["basis"], state["t"], self.lr * factor
        b, g = b.double(), g.double()
        c = g.T @ g / g.square().sum()
        inside = 2 * c @ b @ (b.T @ b) + 2 * b @ (b.T @ c @ b) - 4 * c @ b
        slope = inside + 4 * penalty * (b @ (b.T @ b) - b)
        # What rounding makes of a minimum, as where r = short, is no slope: Adam would make full steps of it.
        row_sizes = (c @ b).norm(dim=1, keepdim=True) + penalty * b.norm(dim=1, keepdim=True)
        slope = slope.where(slope.abs() > 32 * torch.finfo(state["basis"].dtype).eps * row_sizes, 0)
        b, slope = state["basis"], slope.to(state["basis"])
        state["basis_m"] = beta1 * state.get("basis_m", torch.zeros_like(b)) + (1 - beta1) * slope
        state["basis_v"] = beta2 * state.get("basis_v", torch.zeros_like(b)) + (1 - beta2) * slope * slope
        direction = state["basis_m"] / (1 - beta1**t) / (state["basis_v"].sqrt() / math.sqrt(1 - beta2**t) + eps)
        state["basis"] = (1 - lr * self.weight_decay) * b - lr * direction

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
        if self.selection == "gaussian":
            assert self.gaussian is not None
            basis = self.gaussian(self.key(name, state["refreshes"]), g.shape[1], r)
        elif self.selection in ("random", "online_pca"):
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
        if self.selection != "gaussian":  # an eigenvector's sign is free: its largest entry is positive
            basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        basis = basis.to(g.dtype)
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
        return torch.Generator().manual_seed(self.key(name, refresh))

    def key(self, name: str, refresh: int) -> int:
        """63 bits of a draw's key."""
        digest = hashlib.blake2b(f"{self.seed}\0{name}\0{refresh}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def adam(self, g: Tensor, state: dict) -> Tensor:
        """M̂ / (√V̂ + ε) of step ``state["t"]`` (from 1)."""
        (beta1, beta2), t = self.betas, state["t"]
        state["m"] = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", torch.zeros_like(g)) + (1 - beta2) * g * g
        return state["m"] / (1 - beta1**t) / (state["v"].sqrt() / math.sqrt(1 - beta2**t) + self.eps)
