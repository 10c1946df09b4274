"""Have accelerate shard on CPUs as it does on accelerators alone.

    accelerate launch --config_file fsdp2.yaml cpus_as_accelerators.py SCRIPT ARGUMENTS

What is sharded, gathered and computed is the same. accelerate asks for an accelerator, since FSDP
makes little sense elsewhere.
"""

import runpy
import sys
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_as_on_accelerators(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if not AcceleratorState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)


def install() -> None:
    """From now on, an `Accelerator` shards if FSDP is asked for."""
    AcceleratorState.__init__ = _init_as_on_accelerators


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
