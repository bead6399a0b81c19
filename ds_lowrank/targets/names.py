"""Parameters under the names that the bare model gives them."""

from __future__ import annotations

from torch import Tensor, nn

from ds_lowrank.layouts import bare_model

# What wrappers put into the names of parameters; the sampler is keyed by the name without it.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean_name(name: str) -> str:
    """A name without what torch.compile, activation checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict of the bare model has: parameters, tied ones under every name, and persistent buffers."""
    bare = bare_model(model)
    found: dict[str, Tensor] = {clean_name(n): p for n, p in bare.named_parameters(remove_duplicate=False)}
    for prefix, module in bare.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[clean_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters, tied ones once, under the names that the bare model gives them."""
    return [(clean_name(name), parameter) for name, parameter in bare_model(model).named_parameters()]
