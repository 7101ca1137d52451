#include "explain.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <vector>

#include "error.h"
#include "plan.h"

namespace blockswap {
namespace {

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

}  // namespace

std::string reason_of(const Plan& plan, const PlanRequest& request, const Simulation& simulation) {
  const double predicted = plan.predicted_seconds * 1e3;
  const double compute = plan.compute_seconds * 1e3;
  const double link = simulation.link_busy_seconds * 1e3;
  const double host = plan.host_seconds * 1e3;
  if (host >= predicted * 0.999 && host > compute) {
    return text(
        "The host sets the pace: it needs %.1f ms to issue a step that takes %.1f ms of "
        "compute and %.1f ms of copies.",
        host, compute, link);
  }
  if (plan.streamed_bytes == 0) {
    return text("Everything stays on the device: compute alone sets the pace (%.1f ms).", compute);
  }
  if (plan.copy_on_compute) {
    return text(
        "Lookahead 0: %.1f ms of copies run on the compute stream, one after another with "
        "%.1f ms of compute.",
        link, compute);
  }
  if (predicted <= compute * 1.005) {
    return text(
        "Compute sets the pace (%.1f ms): all copies hide behind it, the link is busy for "
        "%.1f ms.",
        compute, link);
  }
  const std::string copies =
      format_bytes(plan.streamed_bytes) +
      text(" at %.1f GB/s take %.1f ms", request.link.bytes_per_second / 1e9, link);
  if (link >= predicted * 0.97) {
    return "The link sets the pace: " + copies +
           text(" of a step of %.1f ms; compute needs %.1f ms.", predicted, compute);
  }
  return "Neither can run through: " + copies +
         text(
             ", but the full ring holds the link up for %.1f ms and compute (%.1f ms) waits for "
             "%.1f ms of copies.",
             predicted - link, compute, simulation.stall_seconds * 1e3);
}

std::string explain(const Plan& plan, const PlanRequest& request) {
  struct Row {
    std::vector<char> streams, stays;  // per block of the list, by index of the request
    int64_t resident_bytes = 0, streamed_bytes = 0;
    double seconds = 0.0;
    int copies = 0;
  };
  std::vector<std::string> order;
  std::map<std::string, Row> rows;
  std::map<std::string, int> num_blocks;
  for (const Block& block : request.blocks) {
    if (num_blocks[block.list]++ == 0) order.push_back(block.list);
  }
  for (const std::string& list : order) {
    rows[list].streams.resize(request.blocks.size());
    rows[list].stays.resize(request.blocks.size());
  }
  int copies = 0;
  for (const Piece& piece : plan.pieces) {
    for (int32_t l = piece.first_leaf; l < piece.end_leaf; ++l) {
      const Leaf& leaf = request.leaves[l];
      Row& row = rows[request.blocks[leaf.block].list];
      (piece.resident ? row.stays : row.streams)[leaf.block] = 1;
      (piece.resident ? row.resident_bytes : row.streamed_bytes) += leaf.bytes;
      row.seconds += leaf.seconds;
      if (!piece.resident && l == piece.first_leaf) ++row.copies;
    }
    copies += piece.resident ? 0 : 1;
  }
  size_t width = 5;
  for (const std::string& list : order) width = std::max(width, list.size());
  const int w = static_cast<int>(width);
  std::string out = text("%-*s %7s %6s %6s %6s %11s %11s %7s %11s\n", w, "list", "blocks", "stay",
                         "part", "stream", "resident", "streamed", "copies", "compute ms");
  for (const std::string& list : order) {
    const Row& row = rows[list];
    int whole = 0, part = 0, gone = 0;
    for (size_t b = 0; b < request.blocks.size(); ++b) {
      if (row.stays[b] && row.streams[b]) ++part;
      if (row.stays[b] && !row.streams[b]) ++whole;
      if (!row.stays[b] && row.streams[b]) ++gone;
    }
    out += text("%-*s %7d %6d %6d %6d %11s %11s %7d %11.1f\n", w, list.c_str(), num_blocks[list],
                whole, part, gone, format_bytes(row.resident_bytes).c_str(),
                format_bytes(row.streamed_bytes).c_str(), row.copies, row.seconds * 1e3);
  }
  out += text("on the device %s: residents %s, ring %s",
              format_bytes(plan.resident_bytes + plan.ring_bytes).c_str(),
              format_bytes(plan.resident_bytes).c_str(), format_bytes(plan.ring_bytes).c_str());
  if (request.budget_bytes >= 0) out += ", budget " + format_bytes(request.budget_bytes);
  out += text("\neach step %s in %d copies; pieces of up to %s\n",
              format_bytes(plan.streamed_bytes).c_str(), copies,
              format_bytes(plan.piece_bytes).c_str());
  out += text("predicted %.1f ms, bound %.1f ms, compute %.1f ms\n", plan.predicted_seconds * 1e3,
              plan.bound_seconds * 1e3, plan.compute_seconds * 1e3);
  return out + plan.reason + "\n";
}

}  // namespace blockswap
