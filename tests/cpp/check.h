#pragma once

// The smallest test frame: a test is a function named by a sentence; CHECK reports and goes on.
//
//   TEST(an_empty_plan_has_no_pieces) { CHECK(make_plan({}).pieces.empty()); }
//   int main() { return blockswap::test::run_all(); }

#include <atomic>
#include <cstdio>
#include <exception>
#include <string_view>
#include <utility>
#include <vector>

// A sanitized program has other memory and other speed: such figures are not checked there.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define IS_SANITIZED 1
#endif
#endif
#ifndef IS_SANITIZED
#define IS_SANITIZED 0
#endif

namespace blockswap::test {

inline const char* running = "";
inline std::atomic<int> num_failures{0};
inline std::vector<std::pair<const char*, void (*)()>>& all() {
  static std::vector<std::pair<const char*, void (*)()>> tests;
  return tests;
}

inline void fail(const char* file, int line, const char* what) {
  if (++num_failures <= 20) {  // a wrong byte in a million is one report, not a million
    std::fprintf(stderr, "FAILED %s\n  %s:%d: %s\n", running, file, line, what);
  }
}

inline int run_all() {
  for (const auto& [name, body] : all()) {
    running = name;
    try {
      body();
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__, error.what());
    }
  }
  std::printf("%zu tests, %d failed checks\n", all().size(), num_failures.load());
  return num_failures == 0 ? 0 : 1;
}

}  // namespace blockswap::test

#define TEST(name)                                              \
  static void name();                                           \
  static const bool name##_is_registered =                      \
      (blockswap::test::all().push_back({#name, &name}), true); \
  static void name()

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) blockswap::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)

// The expression throws that type, and its text contains the words.
#define CHECK_THROWS(expression, Type, words)                                       \
  do {                                                                              \
    bool threw = false;                                                             \
    try {                                                                           \
      expression;                                                                   \
    } catch (const Type& error) {                                                   \
      threw = std::string_view(error.what()).find(words) != std::string_view::npos; \
    }                                                                               \
    if (!threw) {                                                                   \
      blockswap::test::fail(__FILE__, __LINE__, #expression " throws " #Type);      \
    }                                                                               \
  } while (false)
