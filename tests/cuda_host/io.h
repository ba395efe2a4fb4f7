// Raw numbers from standard input, and to standard output.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, stdin) != size_t(count)) std::abort();
  return values;
}

// All bits set: NaN, unless somebody writes there.
template <typename T>
std::vector<T> unwritten(int64_t count) {
  std::vector<T> values(count);
  if (count) std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}
