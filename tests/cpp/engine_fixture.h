#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/engine.h"
#include "../../csrc/pinner.h"
#include "check.h"
#include "thread_device.h"

namespace blockswap::test {

// A model of `sizes` pieces with the given residents, a ring, and images full of their own number.
struct Fixture {
  // `bounce_bytes`: the images are pageable and pass through such a ring; 0: pinned; kOnThread:
  // pinned, and a thread issues their copies from the second step on.
  static constexpr int64_t kOnThread = -1;
  Fixture(std::vector<int64_t> sizes, std::vector<bool> resident, int64_t ring_bytes, bool check,
          int streams = 1, int lookahead = -1, int64_t bounce_bytes = 0)
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
    if (bounce_bytes > 0) {
      const auto pinner = std::make_shared<Pinner>(device, Pinner::kNoLimit);
      engine.bounce(BounceRing::make(device, pinner->calls(), bounce_bytes));
    } else {
      for (const std::vector<uint8_t>& image : images) {
        device->pin(const_cast<uint8_t*>(image.data()), static_cast<int64_t>(image.size()));
      }
    }
    load();
    if (bounce_bytes == kOnThread) {
      step(all());
      engine.issue_on_thread();
    }
  }
  ~Fixture() {
    device->synchronize(compute);
    engine.stop();
  }
  void load() {
    std::vector<HostImage> from;
    for (size_t i = 0; i < images.size(); ++i) {
      from.push_back({images[i].data(), engine.bounce_bytes() == 0});
    }
    engine.load(plan, from, ring.data(), compute);
    for (size_t i = 0; i < images.size(); ++i) {
      if (plan.pieces[i].resident) {
        copy_resident(i);
      }
    }
  }
  void copy_resident(size_t piece) {
    engine.copy_fixed(targets[piece].data(), {images[piece].data(), engine.bounce_bytes() == 0},
                      plan.pieces[piece].bytes, compute);
  }
  // The image of a piece has changed.
  void refresh(size_t piece) {
    if (plan.pieces[piece].resident) {
      copy_resident(piece);
    } else {
      engine.invalidate(static_cast<int32_t>(piece));
    }
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

// Orders that no plan foresaw: shuffled, one piece left out and another twice.
inline void run_any_order(unsigned seed, int64_t bounce_bytes) {
  std::mt19937 random(seed);
  for (int round = 0; round < 6; ++round) {
    Fixture f({512, 256, 768, 256, 512, 256, 256}, std::vector<bool>(7, false),
              768 + 256 * (round % 4), round % 2 == 0, 1 + round % 3, -1, bounce_bytes);
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

// Any one copy fails, in any state of the ring; steps that broke off are followed by right ones.
inline void run_failing_copies(int64_t bounce_bytes) {
  for (int64_t copies = 1; copies <= 24; ++copies) {
    Fixture f({512, 256, 768, 256, 512}, std::vector<bool>(5, false), 1024, copies % 2 == 0,
              1 + static_cast<int>(copies % 3), -1, bounce_bytes);
    f.device->copies_until_failure = copies;
    int failed = 0;
    for (int step = 0; step < 12; ++step) {
      try {
        f.step(f.all());
      } catch (const DeviceError&) {
        ++failed;
        f.engine.end_step(f.compute);
      }
    }
    f.device->synchronize(f.compute);
    CHECK(failed == 1);
    CHECK(f.wrong == 0);
  }
}

// Piece 2 fills the ring and is always skipped; 0 and 1 share its range, each on another stream.
inline void run_outrun(int64_t bounce_bytes) {
  Fixture f({256, 256, 512}, std::vector<bool>(3, false), 512, false, 3, -1, bounce_bytes);
  f.device->slow_copy_bytes = 512;
  for (int step = 0; step < 5; ++step) {
    f.step({0, 1});
  }
  f.device->synchronize(f.compute);
  CHECK(f.wrong == 0);
}

}  // namespace blockswap::test
