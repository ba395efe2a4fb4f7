// One side of a gromov problem: where its mass is, and the costs within it, for one instruction set (see each_set.h).
#include "gromov_plan.h"

namespace {
namespace HELO_FAST_SET {

constexpr double kNormFloor = 1e-12;  // of a token, in its cosine cost

// Of two tokens with that inner product; scale, the inverse of the product of their norms, is 0 where that is beyond all numbers.
template <typename number>
HELO_FAST_INLINE number cosine_cost(number product, number scale) {
  const number one = number{} + 1, cost = 1 - product * scale;
  return scale > 0 ? cost : one;
}

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
    scale = arena.take<scalar>(padded<scalar>(size));
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

  // cost = 1 - cos, of the tokens as they are: their norms divide the products.
  void read_tokens(const scalar* tokens) {
    find_points(tokens);
    const int64_t rows = padded_rows(count);
    gram(points, rows, padded<scalar>(width), cost, stride);
    for (int64_t i = 0; i < rows; ++i) {
      norm[i] = std::sqrt(cost[i * stride + i]);
      scale[i] = 1 / (norm[i] > scalar(kNormFloor) ? norm[i] : scalar(kNormFloor));
    }
    for (int64_t i = 0; i < count; ++i)
      for_columns<scalar>(count, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        scalar* c = cost + i * stride + j;
        store(c, cosine_cost<vector>(load<vector>(c), scale[i] * load<vector>(scale + j)));
      });
  }

  // low and high: the extremes of the costs.
  void find_extremes() {
    Largest<scalar> most(-scalar(HUGE_VAL)), minus_least(-scalar(HUGE_VAL));
    for (int64_t i = 0; i < count; ++i) {
      scalar* c = cost + i * stride;
      for (int64_t j = count; j < stride; ++j) c[j] = c[0];
      for_columns<scalar>(count, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        const auto v = load<decltype(zero)>(c + j);
        most.see(v);
        minus_least.see(-v);
      });
    }
    low = -minus_least.result();
    high = most.result();
  }

  // unit = tokens / their norms
  void normalise() {
    const int64_t wide = padded<scalar>(width);
    for (int64_t i = 0; i < padded_rows(count); ++i)
      for (int64_t k = 0; k < wide; k += V::lanes) store(unit + i * wide + k, scale[i] * load<full>(points + i * wide + k));
  }

  scalar threshold(double share) const { return low + scalar(share) * (high - low); }

  // cost = relu(cost - threshold)
  void cut(double share) {
    const scalar t = threshold(share);
    for (int64_t i = 0; i < count; ++i) {
      scalar* c = cost + i * stride;
      for_columns<scalar>(count, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        store(c + j, larger(load<decltype(zero)>(c + j) - t, zero));
      });
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
    Sum<scalar> total;
    for (int64_t i = 0; i < count; ++i)
      for_columns<scalar>(count, [&](auto zero, int64_t j) HELO_FAST_LAMBDA { total.see(load<decltype(zero)>(cost + i * stride + j)); });
    return double(total.result()) / (double(count) * double(count));
  }

  int64_t size, width, count = 0, stride = 0;
  int64_t* where;      // [count]
  scalar *mass;        // [stride]
  scalar *cost;        // [count, stride]
  // Of tokens only, in whole blocks of rows, where the last is repeated:
  const scalar* points;  // [padded_rows(count), padded(width)]: the tokens, where they lie or in unit
  scalar *unit;          // as points
  scalar *norm, *scale;  // [padded_rows(count)]; 1 / the floored norm
  scalar low = 0, high = 0;

 private:
  void find_points(const scalar* tokens) {
    const int64_t wide = padded<scalar>(width), rows = padded_rows(count);
    points = tokens;
    if (count == size && rows == size && wide == width) return;
    points = unit;
    for (int64_t i = 0; i < rows; ++i) {
      const scalar* from = tokens + where[i < count ? i : count - 1] * width;
      for (int64_t k = 0; k < width; ++k) unit[i * wide + k] = from[k];
      for (int64_t k = width; k < wide; ++k) unit[i * wide + k] = 0;
    }
  }
};

// cost [n, m] = 1 - cos of the tokens of two spaces, 0 in the padding of its columns.
template <typename scalar>
void cross_costs(const Space<scalar>& x, const Space<scalar>& y, scalar* cost) {
  inner_products(x.points, y.points, padded_rows(x.count), padded_rows(y.count), padded<scalar>(x.width), cost, y.stride);
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t j = 0; j < y.stride; ++j) {
      scalar* c = cost + i * y.stride + j;
      *c = j < y.count ? cosine_cost(*c, x.scale[i] * y.scale[j]) : 0;
    }
}

// sums[j] += sum_i weights[i] matrix_ij, and the same of the squares; matrix [count, count].
template <typename scalar>
void weigh_rows(const scalar* matrix, int64_t stride, const scalar* weights, int64_t count, scalar* sums, scalar* squares) {
  for_columns<scalar>(count, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
    auto sum = load<decltype(zero)>(sums + j), square = load<decltype(zero)>(squares + j);
    for (int64_t i = 0; i < count; ++i) {
      const auto v = load<decltype(zero)>(matrix + i * stride + j), weighed = weights[i] * v;
      sum += weighed;
      square += weighed * v;
    }
    store(sums + j, sum);
    store(squares + j, square);
  });
}

}  // namespace HELO_FAST_SET
}  // namespace
