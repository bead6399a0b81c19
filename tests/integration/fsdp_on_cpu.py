"""launch/pretrain.py under FSDP2 on CPU ranks, for tests only: accelerate selects FSDP on accelerators alone.

It looks at the kind of device and at nothing else: with the kind of distribution set to FSDP the Trainer's,
accelerate's and torch's FSDP2 run on gloo as they are.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import pretrain

_initialise = AcceleratorState.__init__


def _select_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type  # as its own branch for FSDP does


AcceleratorState.__init__ = _select_fsdp

if __name__ == "__main__":
    sys.exit(pretrain.main(sys.argv[1:]))
