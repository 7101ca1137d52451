#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace blockswap {

// Order of leaving the device: lower levels stream first. Priority 0 goes before leaves without a
// priority, every higher priority after them; kPinned never streams.
int32_t level_of(const Leaf& leaf);

// Per block, whether offload_blocks makes it stream: n blocks of a list, lowest level first, even
// over compute time within a level. Empty when the request names no blocks. Throws ConfigError for
// an unknown list or a count that the list does not have.
std::vector<char> choose_blocks(const PlanRequest& request);

// Merges leaves in execution order into pieces of at most target_bytes; a larger leaf stays alone.
// Leaves of different levels never share a piece, nor do leaves of different blocks where blocks
// were chosen. Pinned pieces, and those of blocks not chosen, are marked resident.
std::vector<Piece> cut_pieces(const PlanRequest& request, int64_t target_bytes,
                              const std::vector<char>& block_streams);

}  // namespace blockswap
