// The engine on a device whose streams are threads and whose kernels check what they read. Run
// under ASan and TSan.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "engine_fixture.h"

using namespace blockswap;
using blockswap::test::Fixture;
using blockswap::test::run_any_order;
using blockswap::test::run_failing_copies;
using blockswap::test::run_outrun;

namespace {

TEST(every_kernel_sees_its_own_piece_in_the_planned_order) {
  for (const int64_t ring : {768, 1024, 1536, 4096}) {
    for (const bool check : {false, true}) {
      Fixture f({512, 256, 768, 256, 512, 256}, {false, true, false, false, false, false}, ring,
                check);
      for (int step = 0; step < 12; ++step) {
        f.step(f.all());
      }
      f.device->synchronize(f.compute);
      CHECK(f.wrong == 0);
      CHECK(f.engine.counters().mispredicted == 0);
    }
  }
}

TEST(one_copy_per_streamed_piece_and_step) {
  Fixture f({512, 256, 768, 256}, {false, true, false, false}, 1024, true);
  for (int step = 0; step < 10; ++step) {
    f.step(f.all());
  }
  const Counters counters = f.engine.counters();
  CHECK(counters.steps == 10);
  CHECK(counters.copies >= 30 && counters.copies <= 33);  // and what is fetched ahead
}

TEST(any_order_skips_and_repeats_stay_right) { run_any_order(3, 0); }

TEST(a_copy_that_nobody_used_is_over_before_any_piece_comes_into_its_range) { run_outrun(0); }

TEST(what_a_thread_issues_from_the_second_step_on_stays_right) {
  run_any_order(7, Fixture::kOnThread);
  run_outrun(Fixture::kOnThread);
  run_failing_copies(Fixture::kOnThread);
}

TEST(a_step_that_breaks_off_leaves_the_next_one_right) {
  Fixture f({512, 256, 768, 256}, std::vector<bool>(4, false), 1024, true);
  for (int step = 0; step < 8; ++step) {
    f.engine.begin_step(f.compute);
    f.run(0);
    if (step % 2 == 0) {
      f.engine.acquire(1, f.compute);  // never released: the block failed
    } else {
      f.run(1);
      f.run(2);
      f.run(3);
    }
    f.engine.end_step(f.compute);
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(a_step_that_a_failed_copy_breaks_off_leaves_the_next_one_right) { run_failing_copies(0); }

TEST(a_step_goes_no_further_once_the_device_has_failed_in_it) {
  Fixture f({512, 256, 768, 256}, std::vector<bool>(4, false), 1024, false);
  f.engine.begin_step(f.compute);
  f.run(0);
  f.device->copies_until_failure = 1;
  CHECK_THROWS(f.run(1), DeviceError, "the copy failed");
  CHECK_THROWS(f.run(2), DeviceError, "the device failed earlier in this step");
  CHECK(f.engine.live() == -1);
  f.engine.invalidate(1);
  f.engine.end_step(f.compute);
  f.wrong = 0;
  f.step(f.all());
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(edited_images_are_used_by_the_very_next_step) {
  Fixture f({512, 256, 768, 256}, {true, false, false, true}, 1024, false);
  for (int step = 0; step < 10; ++step) {
    f.step(f.all());
    f.device->synchronize(f.compute);
    CHECK(f.wrong == 0);
    const auto piece = static_cast<size_t>(step % 4);
    std::fill(f.images[piece].begin(), f.images[piece].end(), static_cast<uint8_t>(100 + step));
    f.refresh(piece);
  }
}

TEST(an_edited_resident_is_copied_behind_the_step_that_reads_it) {
  Fixture f({512, 256, 768, 256}, {true, false, false, true}, 1024, false);
  f.step(f.all());
  f.device->synchronize(f.compute);
  std::atomic<bool> goes_on{false};
  f.device->hold(f.compute, goes_on);
  f.step(f.all());
  std::fill(f.images[0].begin(), f.images[0].end(), uint8_t{100});
  f.refresh(0);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // for a copy that would not wait
  goes_on = true;
  f.step(f.all());
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(a_plan_is_filled_behind_what_computed_in_its_memory) {
  Fixture f({512, 256, 768, 256}, {true, false, false, false}, 1024, false);
  f.step(f.all());
  f.engine.stop();                                       // waits for all of it
  std::fill(f.ring.begin(), f.ring.end(), uint8_t{77});  // somebody else's, who has freed it
  std::fill(f.targets[0].begin(), f.targets[0].end(), uint8_t{77});
  std::atomic<bool> goes_on{false};
  f.device->hold(f.compute, goes_on);
  f.device->enqueue_kernel(f.compute, f.ring.data(), f.plan.ring_bytes, 77, f.wrong);
  f.device->enqueue_kernel(f.compute, f.targets[0].data(), 512, 77, f.wrong);
  f.load();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // for copies that would not wait
  goes_on = true;
  f.step(f.all());
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(lookahead_zero_copies_on_the_compute_stream) {
  Fixture f({512, 256, 768, 256}, std::vector<bool>(4, false), 1024, true, 1, 0);
  CHECK(f.plan.copy_on_compute);
  for (int step = 0; step < 6; ++step) {
    f.step(f.all());
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
  CHECK(f.engine.counters().copies == 24);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
