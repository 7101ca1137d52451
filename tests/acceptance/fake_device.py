"""What diffusers' tests ask of the fake accelerator: a DIFFUSERS_TEST_DEVICE_SPEC."""

import torch

from tests import fake

_device_module = fake.load()

DEVICE_NAME = "fake"
MANUAL_SEED_FN = torch.manual_seed
EMPTY_CACHE_FN = _device_module.empty_cache
DEVICE_COUNT_FN = _device_module.device_count
SUPPORTS_TRAINING = True
RESET_PEAK_MEMORY_STATS_FN = _device_module.reset_peak_memory_stats
RESET_MAX_MEMORY_ALLOCATED_FN = _device_module.reset_peak_memory_stats
MAX_MEMORY_ALLOCATED_FN = _device_module.max_memory_allocated
