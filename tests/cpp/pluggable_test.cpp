// The pools that serve PyTorch, with host memory in place of a GPU's.

#include "../../csrc/device/pluggable.h"

#include "../../csrc/error.h"
#include "check.h"

using namespace blockswap;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr Device::Stream kA{0}, kB{1};

std::shared_ptr<CachingPool> make_host_pool() {
  return std::make_shared<CachingPool>(make_cpu_device(), make_host_pages(64 * kMiB, 2 * kMiB),
                                       CachingPool::kNoLimit);
}

TEST(each_device_has_its_pool_until_another_one_is_set) {
  const auto pool = make_host_pool();
  CHECK(!is_pluggable(*pool));
  set_pluggable_pool(3, pool);
  CHECK(pluggable_pool(3) == pool && is_pluggable(*pool));
  set_pluggable_pool(3, nullptr);
  CHECK(!is_pluggable(*pool));
}

TEST(a_use_reaches_the_pool_that_has_the_block_and_no_other) {
  const auto first = make_host_pool(), second = make_host_pool();
  set_pluggable_pool(3, first);
  set_pluggable_pool(4, second);
  void* block = second->allocate(5 * kMiB, kA);
  record_pluggable_use(block, kB);
  record_pluggable_use(&block, kB);  // of nobody's memory
  second->free(block, kA);
  CHECK(second->stats().pending_bytes == 5 * kMiB);
  trim_pluggable_pools();
  CHECK(second->stats().reserved_bytes == 0);
  set_pluggable_pool(3, nullptr);
  set_pluggable_pool(4, nullptr);
}

TEST(a_build_without_gpu_says_so_when_a_pool_is_wanted) {
  CHECK_THROWS(pluggable_pool(5), DeviceError, "no GPU support");
  trim_pluggable_pools();
}

}  // namespace

int main() { return blockswap::test::run_all(); }
