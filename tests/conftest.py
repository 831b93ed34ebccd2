"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined."""
import os
import sys
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)                                        # tensors are small, and the cores may be busy
os.environ["OMP_NUM_THREADS"] = "1"                             # so do the processes that tests start
for name, same in (("same", True), ("anew", False)):             # draws: --hypothesis-profile=anew has others
    hypothesis.settings.register_profile(name, deadline=None, print_blob=True, derandomize=same)
hypothesis.settings.load_profile("same")
