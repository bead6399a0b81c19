"""Faults of what one rank computes, for scripts/mutants.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file: in ``ds_lowrank``.
        old, new: what is there, once, and what takes its place.
        breaks: what that does.
        first: which test file is asked first, behind ``tests/``, with pytest's options.
    """

    file: str
    old: str
    new: str
    breaks: str
    first: str = "threads/test_thread_update.py"


# The arithmetic of one rank: products, spectra, rules, formats.
ARITHMETIC = [
    Mutant(
        "subspace/project.py",
        "beta=keep, alpha=-step_size)\n        else:",
        "beta=keep, alpha=step_size)\n        else:",
        "the step goes uphill",
    ),
    Mutant(
        "subspace/project.py",
        "_move(wide, part, basis, step_size, keep, pushing)",
        "_move(wide, part, basis, step_size, 1.0, pushing)",
        "bf16 weights do not decay",
        "threads/test_thread_formats.py -k rounded_alike",
    ),
    Mutant(
        "subspace/project.py",
        "beta=0 if first == 0 else 1)",
        "beta=0)",
        "a Gram has the last rows only",
        "threads/test_thread_update.py -k llama",
    ),
    Mutant(
        "subspace/project.py",
        "out[right:, left:right].copy_(out[left:right, right:].mT)",
        "pass",
        "half of a large Gram is not mirrored",
        "threads/test_thread_update.py -k llama",
    ),
    Mutant(
        "subspace/project.py",
        "(product.abs() <= floor) & drawn",
        "(product.abs() <= 0 * floor) & drawn",
        "what rounding made of nothing becomes a step",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "selections/carry.py",
        "moments[name] = moments[name] @ cross",
        "moments[name] = moments[name] @ cross.mT",
        "moments turn the wrong way",
    ),
    Mutant(
        "selections/spectral.py",
        "torch.arange(r) < found",
        "torch.arange(r) <= found",
        "a drawn direction counts as the gradient's",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "selections/spectral.py",
        "keys = log_weights - torch.log",
        "keys = -log_weights - torch.log",
        "small directions are the likely ones",
    ),
    Mutant("selections/spectral.py", "[:r].sort().values", "[:r]", "kept directions are not in order"),
    Mutant(
        "selections/base.py",
        'f"{self.seed}\\0{self.name}\\0{self.refresh}"',
        'f"{self.seed}\\0{self.name}\\0{0}"',
        "every refresh draws the same",
    ),
    Mutant(
        "selections/spectral.py",
        "for _ in range(2):  # once",
        "for _ in range(0):  # once",
        "a drawn direction is not orthogonal to the kept ones",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "subspace/spectrum.py",
        "torch.where(peaks < 0, -vectors, vectors)",
        "vectors",
        "signs of a basis are left to the decomposition",
    ),
    Mutant(
        "subspace/spectrum.py",
        "values, vectors = values.flip(0), vectors.flip(1)",
        "values = values.flip(0)",
        "the least directions are kept for the largest",
    ),
    Mutant(
        "subspace/sides.py",
        'return "right" if m >= n else "left"',
        'return "right" if m > n else "left"',
        "square matrices are projected on their other side",
    ),
    Mutant(
        "states/dynamic.py",
        "found if signed else torch.where((x > 0) & (found == 0), 1, found)",
        "found",
        "small second moments become zero",
        "unit/test_states.py",
    ),
    Mutant(
        "states/dynamic.py",
        "for blocks, scale in cut(values, scales, self._block):",
        "for blocks, scale in cut(values, scales[:, :1].expand_as(scales), self._block):",
        "all of a row has its first block's scale",
        "unit/test_states.py",
    ),
    Mutant(
        "states/linear.py",
        "halves[:, 0::2] | halves[:, 1::2] << 4",
        "halves[:, 1::2] | halves[:, 0::2] << 4",
        "two codes of a byte change places",
        "unit/test_states.py",
    ),
    Mutant(
        "states/packing.py",
        "part.contiguous().view(tensor.dtype) for part",
        "part.flip(0).contiguous().view(tensor.dtype) for part",
        "rows of a quantised basis travel in another order",
        "threads/test_thread_formats.py -k rounds_where",
    ),
    Mutant(
        "states/rounding.py",
        "return replace(self, first=self.first + rows * self.strides[0])",
        "return self",
        "all blocks of rows are rounded by the same bits",
        "threads/test_thread_formats.py -k many_rows",
    ),
    Mutant(
        "states/rounding.py",
        "index = torch.arange(start, stop, device=x.device)[:, None] * place.strides[0] + across",
        "index = torch.arange(start, stop, device=x.device)[:, None] * len(across) + across",
        "bits depend on how a matrix is cut",
        "threads/test_thread_formats.py -k rounded_alike",
    ),
]

# Of methods beside AdamW on a gradient's own directions.
METHODS = [
    Mutant(
        "subspace/project.py",
        "gradient, value=-push.step_size)",
        "gradient, value=push.step_size)",
        "the gradient moves weights uphill",
        "threads/test_thread_method_layouts.py",
    ),
    Mutant(
        "rules/base.py",
        "torch.tensor(self.counts, device",
        "torch.tensor(self.counts[::-1], device",
        "rows have the number of another matrix of their stack",
        "threads/test_thread_method_layouts.py",
    ),
    Mutant(
        "rules/base.py",
        "torch.stack([part.sum() for part in numbers.split(self.counts)])",
        "numbers.sum().repeat(len(self.counts))",
        "matrices of a stack have one sum",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/grams.py",
        "kept, r, hyper.step, hyper.betas, hyper.eps).abs_()",
        "kept, r, hyper.step, hyper.betas, hyper.eps)",
        "grams turns moments round where a gradient is negative",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/fira.py",
        "total = yield stack.totals(phi.square().mul_(residual))",
        "total = stack.totals(phi.square().mul_(residual))\n        yield total",
        "fira limits by the norm of one rank's rows",
        "threads/test_thread_method_layouts.py -k fira",
    ),
    Mutant(
        "rules/fira.py",
        "row_scale[:, None], value=-1)",
        "row_scale[:, None], value=1)",
        "fira's residual has what the basis sees twice",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/fira.py",
        "add_(stack.lifted_squares(r), alpha=alpha**2)",
        "add_(stack.lifted_squares(r))",
        "the norm of fira's residual has another scale",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/apollo.py",
        "phi = lengths.div_(sizes.add_(TINY))  # times c",
        "phi = lengths.div_(sizes.add_(TINY)).div_(correction(hyper))",
        "apollo's step sizes are not corrected for bias",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/apollo.py",
        "limit(state, phi * gradient, ",
        "limit(state, gradient, ",
        "apollo_mini limits the gradient in the place of the update",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/limiter.py",
        "min(1.0, growth * (before + TINY) / norm)",
        "growth * (before + TINY) / norm",
        "what has shrunk is scaled up by the limiter",
        "unit/test_methods.py",
    ),
    Mutant(
        "rules/limiter.py",
        "remembered.append(factor * norm if",
        "remembered.append(norm if",
        "the limiter remembers a norm that it has not let through",
        "unit/test_methods.py",
    ),
    Mutant(
        "kernels/gaussian.py",
        "torch_fill_(out, first, words(number), width**-0.5)",
        "torch_fill_(out, first, words(number), 1.0)",
        "random projections make rows longer",
        "unit/test_methods.py",
    ),
    Mutant(
        "selections/online_pca.py",
        "excess - sketch.s",
        "excess + sketch.s",
        "a basis turns away from the gradient",
        "unit/test_methods.py",
    ),
    Mutant(
        "selections/online_pca.py",
        "m.lerp_(slope, weight * (1 - beta1))",
        "m.lerp_(slope, 1 - beta1)",
        "moments of a basis decay where there is no gradient",
        "unit/test_methods.py",
    ),
    Mutant(
        "selections/online_pca.py",
        "NOISE * torch.finfo",
        "0 * torch.finfo",
        "of a slope that is rounding a basis makes full steps",
        "threads/test_thread_method_layouts.py -k fewer-rows",
    ),
]
