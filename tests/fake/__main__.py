"""`python -m tests.fake` builds the backend, so that no test's time limit has to cover the compiler."""

from . import build_directory, load

load(verbose=True)
print(f"built in {build_directory()}")
