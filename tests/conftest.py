"""One thread per test process: the tests are small, and pytest-xdist takes the cores."""

import torch

torch.set_num_threads(1)
