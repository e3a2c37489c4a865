"""Each test process computes on one thread; pytest-xdist runs one a core."""

import torch

torch.set_num_threads(1)
