// The plan's reference, written apart from csrc: its own simulator and a search that is dumb, slow
// and thorough. Compiled by plan_reference.py with the system's compiler; loaded through ctypes.
//
// Two rings are modelled:
//   floating  a byte FIFO without any waste: a copy starts once the oldest pieces have left enough
//             bytes. No plan with fixed slots can do this in general; a bar set high on purpose.
//   laps      slots fixed from step to step: pieces fill the ring from offset 0 until one does not
//             fit, which begins the next lap at offset 0; laps of equal height.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace {

struct Problem {
  int n;
  const int64_t* bytes;
  const double* seconds;
  int64_t budget;
  double link, copy_cost;
  bool floating;
};

using Flags = std::vector<char>;

int64_t total_of(const Problem& p, const Flags& stays, bool resident) {
  int64_t sum = 0;
  for (int i = 0; i < p.n; ++i) sum += (stays[i] != 0) == resident ? p.bytes[i] : 0;
  return sum;
}

// For each streamed piece: how many streamed pieces back in the cycle it must wait for.
bool waits(const Problem& p, const std::vector<int>& order, int64_t ring, std::vector<int>& back) {
  const int m = static_cast<int>(order.size());
  back.assign(m, m);
  for (int i : order) {
    if (p.bytes[i] > ring) return false;
  }
  if (p.floating) {
    for (int i = 0; i < m; ++i) {
      int64_t live = p.bytes[order[i]];
      for (int d = 1; d <= m; ++d) {
        live += p.bytes[order[(i - d + m) % m]];
        if (live > ring || d == m) {
          back[i] = d;
          break;
        }
      }
    }
    return true;
  }
  const auto lay = [&](int64_t height, std::vector<int64_t>& at) {
    int laps = 1;
    int64_t top = 0;
    for (int i = 0; i < m; ++i) {
      if (top + p.bytes[order[i]] > height) top = 0, ++laps;
      at[i] = top;
      top += p.bytes[order[i]];
    }
    return laps;
  };
  std::vector<int64_t> at(m), tried(m);
  const int laps = lay(ring, at);
  int64_t low = 0, high = ring;
  for (int i : order) low = std::max(low, p.bytes[i]);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (lay(middle, tried) <= laps) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  lay(high, at);
  for (int i = 0; i < m; ++i) {
    for (int d = 1; d <= m; ++d) {
      const int j = (i - d + m) % m;
      if (at[j] < at[i] + p.bytes[order[i]] && at[i] < at[j] + p.bytes[order[j]]) {
        back[i] = d;
        break;
      }
    }
  }
  return true;
}

double step_seconds(const Problem& p, const Flags& stays, int64_t ring) {
  std::vector<int> order, back;
  double compute = 0.0, copies = 0.0;
  for (int i = 0; i < p.n; ++i) {
    compute += p.seconds[i];
    if (stays[i]) continue;
    order.push_back(i);
    copies += p.bytes[i] / p.link + p.copy_cost;
  }
  const int m = static_cast<int>(order.size());
  if (m == 0) return compute;
  if (!waits(p, order, ring, back)) return INFINITY;
  std::vector<double> released;  // of every streamed run since the beginning
  double now = 0.0, link_free = 0.0, last = 0.0, before = 0.0, step = 0.0;
  for (int s = 0; s < 24; ++s) {
    int k = 0;
    for (int i = 0; i < p.n; ++i) {
      if (!stays[i]) {
        const int wanted = s * m + k - back[k];
        const double room = wanted >= 0 ? released[wanted] : 0.0;
        link_free = std::max(link_free, room) + p.bytes[i] / p.link + p.copy_cost;
        now = std::max(now, link_free) + p.seconds[i];
        released.push_back(now);
        ++k;
      } else {
        now += p.seconds[i];
      }
    }
    step = now - last;
    if (s > 2 && std::fabs(step - before) < 1e-7 * step) break;
    before = step;
    last = now;
  }
  return std::max({step, compute, copies});
}

bool fits(const Problem& p, const Flags& stays, int64_t ring) {
  if (total_of(p, stays, false) == 0) return total_of(p, stays, true) <= p.budget;
  return total_of(p, stays, true) + ring <= p.budget;
}

// Eight ring sizes, evenly in the exponent from the largest piece to the whole budget.
std::vector<int64_t> rings(const Problem& p) {
  const double low = static_cast<double>(*std::max_element(p.bytes, p.bytes + p.n));
  const double high = std::max(low, static_cast<double>(p.budget));
  std::vector<int64_t> sizes;
  for (int i = 0; i < 8; ++i) {
    sizes.push_back(static_cast<int64_t>(low * std::pow(high / low, i / 8.0)));
  }
  return sizes;
}

double all_subsets(const Problem& p) {
  double best = INFINITY;
  Flags stays(p.n);
  for (uint32_t mask = 0; mask < (1u << p.n); ++mask) {
    for (int i = 0; i < p.n; ++i) stays[i] = (mask >> i) & 1;
    for (int64_t ring : rings(p)) {
      if (fits(p, stays, ring)) best = std::min(best, step_seconds(p, stays, ring));
    }
  }
  return best;
}

double climb(const Problem& p, std::mt19937_64& random, int max_failures) {
  const std::vector<int64_t> sizes = rings(p);
  int64_t ring = sizes[random() % sizes.size()];
  Flags stays(p.n, 1);
  while (!fits(p, stays, ring)) {  // a random start: stream pieces until the rest fits
    const int64_t streamed = total_of(p, stays, false);
    if (streamed == total_of(p, Flags(p.n, 0), false)) ring = sizes[0];
    stays[random() % p.n] = 0;
  }
  double best = step_seconds(p, stays, ring);
  for (int failures = 0; failures < max_failures; ++failures) {
    Flags tried = stays;
    int64_t other = ring;
    const int a = static_cast<int>(random() % p.n), b = static_cast<int>(random() % p.n);
    tried[a] ^= 1;
    if (random() % 2) {
      if (stays[a] == stays[b]) continue;
      tried[b] ^= 1;
    } else if (random() % 4 == 0) {
      other = sizes[random() % sizes.size()];
    }
    if (!fits(p, tried, other)) continue;
    const double seconds = step_seconds(p, tried, other);
    if (seconds < best * (1 - 1e-12)) {
      best = seconds;
      stays = tried;
      ring = other;
      failures = -1;
    }
  }
  return best;
}

}  // namespace

extern "C" double reference_seconds(int n, const int64_t* bytes, const double* seconds,
                                    int64_t budget, double link, double copy_cost, int floating,
                                    int num_starts, int max_failures, uint64_t seed) {
  const Problem p{n, bytes, seconds, budget, link, copy_cost, floating != 0};
  if (n <= 14) return all_subsets(p);
  std::mt19937_64 random(seed);
  double best = INFINITY;
  for (int s = 0; s < num_starts; ++s) best = std::min(best, climb(p, random, max_failures));
  return best;
}
