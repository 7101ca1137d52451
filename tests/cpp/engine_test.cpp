// The engine on a device whose streams are threads and whose kernels check what they read. Run
// under ASan and TSan.

#include "../../csrc/engine.h"

#include <algorithm>
#include <random>

#include "check.h"
#include "thread_device.h"

using namespace blockswap;
using blockswap::test::ThreadDevice;

namespace {

// A model of `sizes` pieces with the given residents, a ring, and images full of their own number.
struct Fixture {
  Fixture(std::vector<int64_t> sizes, std::vector<bool> resident, int64_t ring_bytes, bool check,
          int streams = 1, int lookahead = -1)
      : device(std::make_shared<ThreadDevice>()),
        compute(device->make_stream()),
        engine(device, EngineOptions{streams, check, 0.0, 0.0}),
        ring(ring_bytes) {
    request.lookahead = lookahead;
    for (size_t i = 0; i < sizes.size(); ++i) {
      request.leaves.push_back(
          {std::to_string(i), sizes[i], 1e-3, 0.0, 0.0, static_cast<int32_t>(i)});
      request.blocks.push_back({std::to_string(i), "blocks"});
      Piece piece;
      piece.first_leaf = static_cast<int32_t>(i);
      piece.end_leaf = piece.first_leaf + 1;
      piece.bytes = sizes[i];
      piece.seconds = 1e-3;
      piece.resident = resident[i];
      plan.pieces.push_back(piece);
      images.emplace_back(static_cast<size_t>(sizes[i]), static_cast<uint8_t>(i + 1));
      targets.emplace_back(resident[i] ? static_cast<size_t>(sizes[i]) : 0);
    }
    request.link.bytes_per_second = 1e9;
    plan.ring_bytes = ring_bytes;
    assign_slots(plan, request);
    load();
  }
  ~Fixture() {
    device->synchronize(compute);
    engine.stop();
  }
  void load() {
    std::vector<const void*> from;
    std::vector<void*> to;
    for (size_t i = 0; i < images.size(); ++i) {
      from.push_back(images[i].data());
      to.push_back(targets[i].data());
    }
    engine.load(plan, request, from, to, ring.data());
  }
  void run(int32_t piece) {
    const auto i = static_cast<size_t>(piece);
    if (!plan.pieces[i].resident) {
      engine.acquire(piece, compute);
    }
    const uint8_t* range =
        plan.pieces[i].resident ? targets[i].data() : ring.data() + plan.pieces[i].slot_offset;
    device->enqueue_kernel(compute, range, plan.pieces[i].bytes, images[i][0], wrong);
    if (!plan.pieces[i].resident) {
      engine.release(piece, compute);
    }
  }
  void step(const std::vector<int32_t>& order) {
    engine.begin_step(compute);
    for (const int32_t piece : order) {
      run(piece);
    }
    engine.end_step(compute);
  }
  std::vector<int32_t> all() const {
    std::vector<int32_t> order;
    for (size_t i = 0; i < images.size(); ++i) {
      order.push_back(static_cast<int32_t>(i));
    }
    return order;
  }

  std::shared_ptr<ThreadDevice> device;
  Device::Stream compute;
  Engine engine;
  PlanRequest request;
  Plan plan;
  std::vector<std::vector<uint8_t>> images, targets;
  std::vector<uint8_t> ring;
  std::atomic<int> wrong{0};
};

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

TEST(any_order_skips_and_repeats_stay_right) {
  std::mt19937 random(3);
  for (int round = 0; round < 6; ++round) {
    Fixture f({512, 256, 768, 256, 512, 256, 256}, std::vector<bool>(7, false),
              768 + 256 * (round % 4), round % 2 == 0, 1 + round % 3);
    for (int step = 0; step < 10; ++step) {
      std::vector<int32_t> order = f.all();
      if (step % 3 == 1) {
        std::shuffle(order.begin(), order.end(), random);
      } else if (step % 3 == 2) {
        order.erase(order.begin() + static_cast<int>(random() % order.size()));
        order.push_back(order[random() % order.size()]);
      }
      f.step(order);
    }
    f.device->synchronize(f.compute);
    CHECK(f.wrong == 0);
  }
}

TEST(a_copy_that_nobody_used_is_over_before_any_piece_comes_into_its_range) {
  // Piece 2 fills the ring and is always skipped; 0 and 1 share its range, each on another stream.
  Fixture f({256, 256, 512}, std::vector<bool>(3, false), 512, false, 3);
  f.device->slow_copy_bytes = 512;
  for (int step = 0; step < 5; ++step) {
    f.step({0, 1});
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
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

TEST(edited_images_are_used_by_the_very_next_step) {
  Fixture f({512, 256, 768, 256}, {true, false, false, true}, 1024, false);
  for (int step = 0; step < 10; ++step) {
    f.step(f.all());
    f.device->synchronize(f.compute);
    CHECK(f.wrong == 0);
    const auto piece = static_cast<size_t>(step % 4);
    std::fill(f.images[piece].begin(), f.images[piece].end(), static_cast<uint8_t>(100 + step));
    f.engine.invalidate(static_cast<int32_t>(piece));
  }
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
