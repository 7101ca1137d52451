#include "host_pace.h"

#include <algorithm>

namespace blockswap {

HostPace host_pace(const std::vector<Piece>& pieces, const PlanRequest& request, double share) {
  HostPace pace;
  pace.head = share * request.host_seconds;
  pace.seconds_per_copy = request.host_seconds_per_copy;
  pace.over.reserve(pieces.size());
  double issued = pace.head;
  for (const Piece& piece : pieces) {
    double over = issued;
    for (int32_t l = piece.first_leaf; l < piece.end_leaf; ++l) {
      const Leaf& leaf = request.leaves[l];
      issued += share * leaf.host_seconds;
      over = std::max(over + leaf.seconds, issued);
    }
    pace.over.push_back(over);
  }
  pace.step = issued;
  return pace;
}

}  // namespace blockswap
