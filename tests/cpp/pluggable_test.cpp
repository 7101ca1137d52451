// The C entry points, with host memory in place of a GPU's.

#include "../../csrc/device/pluggable.h"

#include <cstring>

#include "../../csrc/error.h"
#include "check.h"

using namespace blockswap;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(blocks_come_from_the_devices_pool_and_go_back_to_it) {
  const auto pool = std::make_shared<CachingPool>(
      make_cpu_device(), make_host_pages(64 * kMiB, 2 * kMiB), CachingPool::kNoLimit);
  set_pluggable_pool(3, pool);
  CHECK(pluggable_pool(3) == pool);
  void* block = blockswap_alloc(5 * kMiB, 3, nullptr);
  std::memset(block, 1, 5 * kMiB);
  CHECK(pool->stats().allocated_bytes == 5 * kMiB);
  blockswap_free(block, 5 * kMiB, 3, nullptr);
  CHECK(pool->stats().allocated_bytes == 0);
  CHECK(blockswap_alloc(0, 3, nullptr) == nullptr);
  blockswap_free(nullptr, 0, 3, nullptr);
  CHECK(take_pluggable_error().empty());

  CHECK(blockswap_alloc(65 * kMiB, 3, nullptr) == nullptr);
  CHECK(take_pluggable_error().find("no 65.0 MiB") != std::string::npos);
  CHECK(take_pluggable_error().empty());
  blockswap_free(block, 5 * kMiB, 3, nullptr);
  CHECK(take_pluggable_error().find("was freed before") != std::string::npos);
  set_pluggable_pool(3, nullptr);
}

TEST(a_build_without_gpu_says_so_when_a_pool_is_wanted) {
  CHECK(blockswap_alloc(1, 5, nullptr) == nullptr);
  CHECK(take_pluggable_error().find("no GPU support") != std::string::npos);
  CHECK_THROWS(pluggable_pool(5), DeviceError, "reinstall");
}

}  // namespace

int main() { return blockswap::test::run_all(); }
