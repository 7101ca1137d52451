// Pageable images: a thread issues the fetches and a small pinned ring carries the bytes. Run under
// ASan and TSan.

#include <algorithm>

#include "engine_fixture.h"

using namespace blockswap;
using blockswap::test::Fixture;
using blockswap::test::run_any_order;
using blockswap::test::run_failing_copies;
using blockswap::test::run_outrun;
using blockswap::test::ThreadDevice;

namespace {

constexpr int64_t kBounce = BounceRing::kLeastBytes;

TEST(pageable_pieces_reach_their_kernels_through_pinned_memory) {
  for (const int64_t ring : {768, 1024, 4096}) {
    for (const int streams : {1, 3}) {
      Fixture f({512, 256, 768, 256, 512, 256}, {false, true, false, false, false, false}, ring,
                ring == 1024, streams, -1, kBounce);
      for (int step = 0; step < 12; ++step) {
        f.step(f.all());
      }
      f.device->synchronize(f.compute);
      CHECK(f.wrong == 0);
      CHECK(f.device->unpinned_copies == 0);
      CHECK(f.engine.counters().mispredicted == 0);
    }
  }
}

TEST(images_larger_than_the_whole_ring_pass_part_by_part) {
  const int64_t large = kBounce + 4096;
  Fixture f({large, large / 2, large}, {false, false, true}, large + large / 2, false, 1, -1,
            kBounce);
  f.device->slow_copy_bytes = kBounce / BounceRing::kNumSlots;
  for (int step = 0; step < 4; ++step) {
    f.step(f.all());
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
  CHECK(f.device->unpinned_copies == 0);
}

TEST(what_the_host_waited_for_the_thread_is_told_apart_from_its_own_time) {
  const int64_t large = 4 * kBounce;
  Fixture f({large, large, large}, {false, false, false}, 2 * large, false, 1, -1, kBounce);
  f.device->slow_copy_bytes = kBounce / BounceRing::kNumSlots;  // some 16 of them for each piece
  for (int step = 0; step < 3; ++step) {
    f.step(f.all());
  }
  const HostTimes times = f.engine.host_times();
  CHECK(times.waiting_seconds > 4e-3);
  CHECK(times.waiting_seconds < times.step_seconds);
  CHECK(3 * times.seconds_per_piece < times.step_seconds - times.waiting_seconds);
  CHECK(times.waited.size() == 3 && times.issued.size() == 3);
  for (size_t i = 0; i < 3; ++i) {
    CHECK(times.waited[i] <= times.issued[i].second);
    CHECK(i == 0 || times.waited[i] > times.waited[i - 1]);
  }
}

TEST(a_host_without_such_a_thread_waits_for_nothing) {
  Fixture f({512, 256, 768}, {false, false, false}, 1024, false);
  f.step(f.all());
  CHECK(f.engine.host_times().waiting_seconds == 0.0);
  CHECK(f.engine.host_times().waited == std::vector<double>(3, 0.0));
}

TEST(any_order_skips_and_repeats_stay_right) { run_any_order(5, kBounce); }

TEST(a_copy_that_nobody_used_is_over_before_any_piece_comes_into_its_range) { run_outrun(kBounce); }

TEST(lookahead_zero_copies_on_the_compute_stream) {
  Fixture f({512, 256, 768, 256}, std::vector<bool>(4, false), 1024, true, 1, 0, kBounce);
  CHECK(f.plan.copy_on_compute);
  for (int step = 0; step < 6; ++step) {
    f.step(f.all());
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(who_asks_for_copies_does_not_wait_for_the_stream_that_they_are_in) {
  const auto device = std::make_shared<ThreadDevice>();
  const auto pinner = std::make_shared<Pinner>(device, Pinner::kNoLimit);
  const Device::Stream stream = device->make_stream();
  const Device::Event ready = device->make_event(Device::EventKind::kOrders);
  const std::vector<uint8_t> image(4096, 7);
  std::vector<std::vector<uint8_t>> targets(3 * BounceRing::kNumSlots,
                                            std::vector<uint8_t>(image.size()));
  std::atomic<bool> goes_on{false};
  {
    FetchThread thread(device, BounceRing::make(device, pinner->calls(), kBounce));
    device->hold(stream, goes_on);
    for (std::vector<uint8_t>& target : targets) {  // more than there are slots
      Fetch fetch;
      fetch.stream = stream;
      fetch.ready = ready;
      fetch.target = target.data();
      fetch.image = {image.data(), /*is_pinned=*/false};
      fetch.bytes = static_cast<int64_t>(image.size());
      thread.enqueue(fetch);
    }
    goes_on = true;  // only now, and still we came here
    thread.drain();
    device->synchronize(stream);
    for (const std::vector<uint8_t>& target : targets) {
      CHECK(target == image);
    }
  }
  device->destroy_event(ready);
}

TEST(a_failed_copy_is_told_to_who_waits_for_it_and_a_new_plan_starts_clean) {
  Fixture f({512, 256, 768, 256}, std::vector<bool>(4, false), 1024, false, 1, -1, kBounce);
  f.step(f.all());
  f.device->copies_until_failure = 2;
  const auto two_steps = [&] {
    f.step(f.all());
    f.step(f.all());
  };
  CHECK_THROWS(two_steps(), DeviceError, "the copy failed");
  f.engine.end_step(f.compute);
  f.device->synchronize(f.compute);
  f.engine.stop();
  f.load();
  f.wrong = 0;
  for (int step = 0; step < 4; ++step) {
    f.step(f.all());
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

TEST(a_step_that_a_failed_copy_of_the_thread_breaks_off_leaves_the_next_one_right) {
  run_failing_copies(kBounce);
}

TEST(the_ring_is_as_large_as_the_system_pins_and_none_is_right_too) {
  const auto device = std::make_shared<ThreadDevice>();
  const auto pinner = std::make_shared<Pinner>(device, Pinner::kNoLimit);
  CHECK(BounceRing::make(device, pinner->calls(), 8 * kBounce)->bytes() == 8 * kBounce);
  device->most_pinned_bytes = 3 * kBounce;
  CHECK(BounceRing::make(device, pinner->calls(), 8 * kBounce)->bytes() == 2 * kBounce);
  CHECK(pinner->was_refused());
  device->most_pinned_bytes = 0;
  CHECK(BounceRing::make(device, pinner->calls(), 8 * kBounce) == nullptr);
  CHECK(pinner->pinned_bytes() == 0);
}

TEST(a_bound_on_pinned_memory_is_never_passed) {
  const auto device = std::make_shared<ThreadDevice>();
  const auto pinner = std::make_shared<Pinner>(device, 3 << 20);
  HostArena arena(8 << 20, {0, 1 << 20, 3 << 20, 4 << 20, 7 << 20});
  CHECK(!arena.pin(pinner->calls()));
  CHECK(arena.pinned_bytes() == 3 << 20);  // the first two chunks; each later one is too much
  CHECK(pinner->pinned_bytes() == 3 << 20);
  CHECK(!pinner->was_refused());
  CHECK(arena.is_pinned(0, 3 << 20));
  CHECK(!arena.is_pinned(3 << 20, 1));
  arena.unpin();
  CHECK(pinner->pinned_bytes() == 0);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
