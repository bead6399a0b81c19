"""Compiles every kernel for chips that need not be there; prints kernel-chip for each. Run by test_kernels.py."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_lowrank.kernels import triton_blocks, triton_gaussian, triton_lift, triton_moments

SIZES = {"rows": "i32", "r": "i32", "blocks": "i32", "width": "i32", "numel": "i32", "short": "i32"}
ADAM = dict.fromkeys(("w1", "beta2", "w2", "root", "eps", "step_size", "keep", "factor"), "fp32")
PLACES = {"a_row": "i32", "a_column": "i32", "low": "i64", "high": "i64", "first": "i64"}
PLACES |= {"index_row": "i64", "index_column": "i64"}
TABLES = dict.fromkeys(("signed_map", "signed_mid", "unsigned_map", "unsigned_mid", "mid_ptr", "map_ptr"), "*fp32")
FP32 = dict.fromkeys(
    ("x_ptr", "scale_ptr", "out_ptr", "g_ptr", "n_ptr", "b_ptr", "m_scale_ptr", "v_scale_ptr"), "*fp32"
)
TYPES = {**SIZES, **ADAM, **PLACES, **TABLES, **FP32}
BLOCKS = {"ROWS": 16, "BLOCK": 64}
LIFT = {"TILE": 64, "DEPTH": 32}

KERNELS = [
    ("quantise", triton_blocks.quantise_kernel, {"code_ptr": "*u8"}, {"SIGNED": True, **BLOCKS}),
    ("dequantise", triton_blocks.dequantise_kernel, {"code_ptr": "*u8"}, BLOCKS),
    ("linear8", triton_blocks.linear_kernel, {"code_ptr": "*i8"}, {"HALVES": False, **BLOCKS}),
    ("linear4", triton_blocks.linear_kernel, {"code_ptr": "*u8"}, {"HALVES": True, **BLOCKS}),
    ("fp32", triton_moments.plain_kernel, {"m_ptr": "*fp32", "v_ptr": "*fp32"}, {"PART": 1024}),
    ("bf16", triton_moments.plain_kernel, {"m_ptr": "*bf16", "v_ptr": "*bf16"}, {"PART": 1024}),
    ("int8", triton_moments.int8_kernel, {"m_ptr": "*u8", "v_ptr": "*u8"}, BLOCKS),
    ("lift", triton_lift.lift_kernel, {"a_ptr": "*fp32"}, {"STOCHASTIC": False, **LIFT}),
    ("lift_bf16", triton_lift.lift_kernel, {"a_ptr": "*bf16"}, {"STOCHASTIC": False, **LIFT}),
    ("gaussian", triton_gaussian.gaussian_kernel, {}, {"WIDTH": 256}),
    ("stochastic", triton_lift.lift_kernel, {"a_ptr": "*bf16"}, {"STOCHASTIC": True, **LIFT}),
]


def main() -> None:
    for chip in (80, 89, 90):
        for name, kernel, own, constants in KERNELS:
            signature = {a: "constexpr" if a in constants else {**TYPES, **own}[a] for a in kernel.arg_names}
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(kernel.arg_names.index(a),): c for a, c in constants.items()},
            )
            compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32))
            assert compiled.asm["cubin"], name
            print(f"{name}-{chip}", flush=True)


if __name__ == "__main__":
    main()
