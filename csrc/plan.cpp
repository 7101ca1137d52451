#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "cut.h"
#include "error.h"
#include "explain.h"
#include "host_pace.h"
#include "search.h"
#include "simulate.h"
#include "slots.h"

namespace blockswap {
namespace {

constexpr int64_t kMiB = 1 << 20;
// Pieces visited by the search, in all: what keeps make_plan under 100 ms for 1,000 pieces.
constexpr int64_t kSearchWork = 8'000'000;
constexpr size_t kRefinedCuts = 2;

void check_request(const PlanRequest& request) {
  const auto fail = [](const std::string& text) { throw ConfigError("plan: " + text); };
  for (const Leaf& leaf : request.leaves) {
    if (leaf.bytes <= 0 || leaf.bytes % kAlignment != 0) {
      fail("leaf " + leaf.name + " has " + std::to_string(leaf.bytes) +
           " bytes: an image is a positive multiple of " + std::to_string(kAlignment));
    }
    for (const double seconds : {leaf.seconds, leaf.tail_seconds, leaf.host_seconds}) {
      if (!(seconds >= 0.0) || !std::isfinite(seconds)) {
        fail("leaf " + leaf.name + " has a negative or infinite time");
      }
    }
    if (leaf.tail_seconds > leaf.seconds) {
      fail("leaf " + leaf.name + " has a tail longer than itself");
    }
    if (leaf.block < 0 || leaf.block >= static_cast<int32_t>(request.blocks.size())) {
      fail("leaf " + leaf.name + " names block " + std::to_string(leaf.block) + " of " +
           std::to_string(request.blocks.size()));
    }
    if (leaf.priority < kNoPriority) {
      fail("leaf " + leaf.name + " has priority " + std::to_string(leaf.priority) +
           ": 0 is the first to stream, larger numbers stay longer");
    }
  }
  if (!(request.link.bytes_per_second > 0.0) || !(request.link.seconds_per_copy >= 0.0)) {
    fail("the link needs a speed above 0 bytes per second and a copy cost of 0 or more");
  }
  if (!(request.head_seconds >= 0.0) || !(request.host_seconds >= 0.0) ||
      !(request.host_seconds_per_copy >= 0.0)) {
    fail("head and host seconds cannot be negative");
  }
  if (request.ring_bytes < 0 || request.piece_bytes < 0) {
    fail("ring and piece bytes cannot be negative: 0 lets the planner choose");
  }
  if (request.offload_bytes > 0 && !request.offload_blocks.empty()) {
    fail("offload is given in bytes and in blocks: choose one");
  }
}

struct Needs {
  int64_t resident_bytes = 0;  // cannot stream
  int64_t streamable_bytes = 0;
  int64_t largest_bytes = 0;  // of what can stream
};

Needs needs_of(const std::vector<Piece>& pieces) {
  Needs needs;
  for (const Piece& piece : pieces) {
    (piece.resident ? needs.resident_bytes : needs.streamable_bytes) += piece.bytes;
    if (!piece.resident) needs.largest_bytes = std::max(needs.largest_bytes, piece.bytes);
  }
  return needs;
}

// Refuses what no plan can satisfy, before anything is searched.
void check_possible(const PlanRequest& request, const Needs& by_leaf,
                    const std::vector<char>& streams) {
  const int64_t total = by_leaf.resident_bytes + by_leaf.streamable_bytes;
  if (request.offload_bytes > by_leaf.streamable_bytes) {
    throw ConfigError("offload asks for " + format_bytes(request.offload_bytes) + " but only " +
                      format_bytes(by_leaf.streamable_bytes) + " (" +
                      std::to_string(by_leaf.streamable_bytes) +
                      " bytes) can leave the device: the rest is pinned");
  }
  const bool must_stream = request.offload_bytes > 0 || !streams.empty() ||
                           (request.budget_bytes >= 0 && total > request.budget_bytes);
  if (!must_stream || by_leaf.streamable_bytes == 0) {
    if (request.budget_bytes >= 0 && total > request.budget_bytes) {
      throw CapError("plan needs " + format_bytes(total) + " (" + std::to_string(total) +
                     " bytes), none of which may stream, but the cap is " +
                     format_bytes(request.budget_bytes) + ": raise vram, pin less or offload more");
    }
    return;
  }
  Needs needs = by_leaf;
  if (request.piece_bytes > 0) needs = needs_of(cut_pieces(request, request.piece_bytes, streams));
  if (request.ring_bytes > 0 && request.ring_bytes < needs.largest_bytes) {
    const bool leaf_fits = request.ring_bytes >= by_leaf.largest_bytes;
    throw ConfigError(
        "swap_space is " + format_bytes(request.ring_bytes) +
        " but the largest streamed piece has " + format_bytes(needs.largest_bytes) +
        ": enlarge swap_space to " + std::to_string(needs.largest_bytes) + " bytes" +
        (leaf_fits ? " or lower block_size to " + std::to_string(request.ring_bytes) + " bytes"
                   : ""));
  }
  if (request.budget_bytes < 0) return;
  const int64_t ring = std::max(request.ring_bytes, needs.largest_bytes);
  const int64_t needed = needs.resident_bytes + ring;
  if (needed <= request.budget_bytes) return;
  const int64_t smallest = by_leaf.resident_bytes + by_leaf.largest_bytes;
  std::string text = "plan needs " + format_bytes(needed) + " but the cap is " +
                     format_bytes(request.budget_bytes) + ": ";
  if (request.ring_bytes > needs.largest_bytes) {
    text += "lower swap_space to " + format_bytes(needs.largest_bytes) + " or ";
  }
  const int64_t room = request.budget_bytes - by_leaf.resident_bytes;
  if (smallest <= request.budget_bytes && request.piece_bytes > by_leaf.largest_bytes) {
    text += "lower block_size to " + format_bytes(room / kAlignment * kAlignment) +
            " or set mode=\"layerwise\"";
  } else {
    text += streams.empty() ? "raise vram" : "offload more blocks or raise vram";
  }
  throw CapError(text + " (the smallest possible is " + format_bytes(smallest) + ", " +
                 std::to_string(smallest) + " bytes: " + format_bytes(by_leaf.resident_bytes) +
                 " that stay and a ring of the largest leaf, " +
                 format_bytes(by_leaf.largest_bytes) + ")");
}

void shrink_ring(Plan& plan) {
  plan.ring_bytes = 0;
  for (const Piece& piece : plan.pieces) {
    if (piece.resident) continue;
    plan.ring_bytes = std::max(plan.ring_bytes, piece.slot_offset + piece.bytes);
  }
}

std::vector<int64_t> piece_sizes(const PlanRequest& request, const Needs& by_leaf) {
  if (request.piece_bytes > 0) return {request.piece_bytes};
  std::vector<int64_t> sizes = {16 * kMiB, 32 * kMiB,  48 * kMiB, 64 * kMiB,
                                80 * kMiB, 112 * kMiB, 200 * kMiB};
  // A ring or a budget of a few pieces of 16 MiB needs smaller ones, at the price of more copies.
  int64_t room = by_leaf.streamable_bytes / 4;
  if (request.ring_bytes > 0) room = std::min(room, request.ring_bytes);
  if (request.budget_bytes >= 0) {
    room = std::min(room, request.budget_bytes - by_leaf.resident_bytes);
  }
  for (int64_t size : {room, room / 2, room / 4, room / 8, by_leaf.largest_bytes}) {
    if (size < 16 * kMiB || size == by_leaf.largest_bytes) {
      sizes.push_back(std::max<int64_t>(size, 1));
    }
  }
  const bool ring_is_free = request.budget_bytes < 0 || request.offload_bytes > 0;
  if (ring_is_free && request.ring_bytes == 0) {
    // Nothing but the wish to save memory bounds the ring: a piece is a small part of what streams.
    const int64_t most = std::max(by_leaf.streamable_bytes / 8, by_leaf.largest_bytes);
    for (int64_t& size : sizes) size = std::min(size, most);
  }
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

}  // namespace

void predict(Plan& plan, const PlanRequest& request) {
  int copies = 0;
  plan.compute_seconds = request.head_seconds;
  for (Piece& piece : plan.pieces) {
    piece.seconds = 0.0;
    for (int32_t l = piece.first_leaf; l < piece.end_leaf; ++l) {
      piece.seconds += request.leaves[l].seconds;
      piece.tail_seconds = request.leaves[l].tail_seconds;
    }
    plan.compute_seconds += piece.seconds;
    copies += piece.resident ? 0 : 1;
  }
  const double link_seconds =
      static_cast<double>(plan.streamed_bytes) / request.link.bytes_per_second;
  plan.host_seconds = host_pace(plan.pieces, request).step_with(copies);
  plan.bound_seconds = std::max({plan.compute_seconds, plan.host_seconds, link_seconds});
  const Simulation simulation = simulate(plan, request);
  plan.predicted_seconds = simulation.step_seconds;
  plan.reason = reason_of(plan, request, simulation);
}

Plan make_plan(const PlanRequest& request) {
  check_request(request);
  const std::vector<char> streams = choose_blocks(request);
  const Needs by_leaf = needs_of(cut_pieces(request, 1, streams));

  check_possible(request, by_leaf, streams);

  struct Cut {
    int64_t target;
    std::unique_ptr<Search> search;
  };
  std::vector<Cut> cuts;
  for (int64_t target : piece_sizes(request, by_leaf)) {
    std::vector<Piece> pieces = cut_pieces(request, target, streams);
    if (!cuts.empty() && cuts.back().search->pieces().size() == pieces.size()) continue;
    cuts.push_back({target, std::make_unique<Search>(std::move(pieces), request)});
    cuts.back().search->sweep();
  }
  const auto best_first = [&] {
    std::stable_sort(cuts.begin(), cuts.end(), [](const Cut& a, const Cut& b) {
      return a.search->score() < b.search->score();
    });
  };
  best_first();
  const size_t tried = std::min(cuts.size(), kRefinedCuts);
  const auto visits = [&] {
    int64_t sum = 0;
    for (const Cut& cut : cuts) sum += cut.search->work();
    return sum;
  };
  const int64_t left = std::max(kSearchWork - visits(), kSearchWork / 4);
  for (size_t c = 0; c < tried; ++c) {
    cuts[c].search->improve(left / static_cast<int64_t>(tried));
  }
  best_first();
  const Search& search = *cuts[0].search;
  if (!search.found()) throw UseError("plan: the search found none, although one is possible");

  Plan plan;
  plan.pieces = search.pieces();
  plan.piece_bytes = cuts[0].target;
  plan.search_visits = visits();
  int64_t resident_bytes = 0;
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    plan.pieces[p].resident = search.resident()[p] != 0;
    if (plan.pieces[p].resident) resident_bytes += plan.pieces[p].bytes;
  }
  plan.ring_bytes = search.ring_limit();
  if (request.budget_bytes >= 0 && request.ring_bytes == 0) {
    plan.ring_bytes = std::min(plan.ring_bytes, request.budget_bytes - resident_bytes);
  }
  assign_slots(plan, request);
  // A resident that leaves the end of the ring makes it smaller, and room for the next one.
  do {
    if (request.ring_bytes == 0 || plan.streamed_bytes == 0) shrink_ring(plan);
  } while (fill_budget(plan, request));

  predict(plan, request);
  return plan;
}

}  // namespace blockswap
