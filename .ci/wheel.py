"""What an installed wheel must do: load its core, and multiply as torch does."""

import torch

import sparseprune as sp
from sparseprune import _native

assert _native.C is not None, _native.why_no_c()
torch.manual_seed(0)
linear = torch.nn.Linear(96, 64)
sp.prune_(torch.nn.Sequential(linear), 0.8)
layer = sp.SparseLinear.from_linear(linear).requires_grad_(False)
x = torch.randn(5, 96)
with torch.no_grad():
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
print(f"sparseprune {sp.__version__}, tier {_native.C.tier()}, from {_native.C.__file__}")
