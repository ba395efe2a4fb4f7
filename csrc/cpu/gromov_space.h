// One side of a gromov problem: where its mass is, and the costs within it, for one instruction set (see each_set.h).
#include "gromov_plan.h"

namespace {
namespace HELO_FAST_SET {

constexpr double kNormFloor = 1e-12;  // of a token, in its cosine cost

template <typename scalar>
class Space {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;

  Space(Arena& arena, int64_t size, int64_t width) : size(size), width(width) {
    const int64_t rows = padded_rows(size);
    where = arena.take<int64_t>(rows);
    mass = arena.take<scalar>(padded<scalar>(size));
    cost = arena.take<scalar>(rows * padded<scalar>(size));
    norm = arena.take<scalar>(rows);
    unit = arena.take<scalar>(width ? rows * padded<scalar>(width) : 0);
  }

  // The points with mass; the others are left out of all that follows.
  void select(const scalar* masses) {
    count = 0;
    for (int64_t i = 0; i < size; ++i)
      if (masses[i] > 0) where[count] = i, mass[count++] = masses[i];
    stride = padded<scalar>(count);
    for (int64_t i = count; i < stride; ++i) mass[i] = 0;
  }

  void read_cost(const scalar* from) {
    for (int64_t i = 0; i < count; ++i) {
      const scalar* row = from + where[i] * size;
      scalar* c = cost + i * stride;
      if (count == size)
        for (int64_t j = 0; j < count; ++j) c[j] = row[j];
      else
        for (int64_t j = 0; j < count; ++j) c[j] = row[where[j]];
      for (int64_t j = count; j < stride; ++j) c[j] = 0;
    }
  }

  // unit = tokens / their norms, cost = 1 - cos, low and high its extremes.
  void read_tokens(const scalar* tokens) {
    const int64_t wide = padded<scalar>(width);
    for (int64_t i = 0; i < padded_rows(count); ++i) {
      scalar* to = unit + i * wide;
      const int64_t filled = i < count ? width : 0;
      for (int64_t k = 0; k < filled; ++k) to[k] = tokens[where[i] * width + k];
      for (int64_t k = filled; k < wide; ++k) to[k] = 0;
      full squares = {};
      for (int64_t k = 0; k < wide; k += V::lanes) squares += load<full>(to + k) * load<full>(to + k);
      const double length = std::sqrt(double(sum_lanes<scalar>(squares)));
      norm[i] = scalar(length);
      const scalar scale = scalar(1 / (length > kNormFloor ? length : kNormFloor));
      for (int64_t k = 0; k < wide; k += V::lanes) store(to + k, scale * load<full>(to + k));
    }
    gram(unit, padded_rows(count), wide, cost, stride);
    full least = full{} + scalar(HUGE_VAL), most = full{} - scalar(HUGE_VAL);
    for (int64_t i = 0; i < count; ++i) {
      scalar* c = cost + i * stride;
      for (int64_t j = count; j < stride; ++j) c[j] = c[0];
      for (int64_t j = 0; j < stride; j += V::lanes) {
        const full v = 1 - load<full>(c + j);
        least = v < least ? v : least;
        most = v > most ? v : most;
        store(c + j, v);
      }
    }
    low = -largest_lane<scalar>(-least);
    high = largest_lane<scalar>(most);
  }

  scalar threshold(double share) const { return low + scalar(share) * (high - low); }

  // cost = relu(cost - threshold)
  void cut(double share) {
    const scalar t = threshold(share);
    for (int64_t i = 0; i < count; ++i) {
      scalar* c = cost + i * stride;
      for (int64_t j = 0; j < stride; j += V::lanes) {
        const full v = load<full>(c + j) - t;
        store(c + j, v > 0 ? v : full{});
      }
      for (int64_t j = count; j < stride; ++j) c[j] = 0;
    }
  }

  bool symmetric() const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < i; ++j)
        if (!(cost[i * stride + j] == cost[j * stride + i])) return false;
    return true;
  }

  double mean() const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      full sum = {};
      for (int64_t j = 0; j < stride; j += V::lanes) sum += load<full>(cost + i * stride + j);
      total += sum_lanes<scalar>(sum);
    }
    return total / (double(count) * double(count));
  }

  int64_t size, width, count = 0, stride = 0;
  int64_t* where;      // [count]
  scalar *mass;        // [stride]
  scalar *cost;        // [count, stride]
  scalar *unit, *norm; // [padded_rows(count), padded(width)], [padded_rows(count)]: tokens only
  scalar low = 0, high = 0;
};

// cost [n, m] = 1 - cos of the tokens of two spaces, 0 in the padding of its columns.
template <typename scalar>
void cross_costs(const Space<scalar>& x, const Space<scalar>& y, scalar* cost) {
  inner_products(x.unit, y.unit, padded_rows(x.count), padded_rows(y.count), padded<scalar>(x.width), cost, y.stride);
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t j = 0; j < y.stride; ++j) cost[i * y.stride + j] = j < y.count ? 1 - cost[i * y.stride + j] : 0;
}

// sums[j] += sum_i weights[i] matrix_ij, and the same of the squares.
template <typename scalar>
void weigh_rows(
    const scalar* matrix, int64_t stride, const scalar* weights, int64_t rows, scalar* __restrict sums, scalar* __restrict squares) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < stride; ++j) {
      const scalar v = matrix[i * stride + j];
      sums[j] += weights[i] * v;
      squares[j] += weights[i] * v * v;
    }
}

}  // namespace HELO_FAST_SET
}  // namespace
