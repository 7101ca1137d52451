"""What blockswap._C was built for; setup.py writes the module."""

TORCH: str
CUDA: str | None
HIP: str | None
BUILD: str
SANITIZE: str
