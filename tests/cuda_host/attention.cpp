// The CUDA kernels of lcd_attention on the host, lane by lane: problems from standard input, results to standard output.

#include <memory>

#include "common/attention_sizes.h"
#include "io.h"
#include "team.h"

namespace {

using namespace helo_fast;
using Bytes = std::vector<unsigned char>;

// Under a sanitizer one grid a dtype, whatever fits it: compiling them all takes long.
template <typename scalar, typename Call>
bool with_grid_here(int64_t n, int64_t m, int64_t d, const Call& call) {
#if defined(__SANITIZE_ADDRESS__)
  using Grid = std::conditional_t<sizeof(scalar) == 4, AttentionGrid20, AttentionGrid64Double>;
  const bool found = n <= 20 && m <= 20 && d <= kMostAttentionDim<scalar>;
  if (found) call(Grid());
  return found;
#else
  return with_attention_grid<scalar>(n, m, d, call);
#endif
}

// A tensor of a given layout, from its own storage on; read where there is input, else unwritten.
struct Stored {
  Bytes bytes;
  View view;
};
constexpr int64_t size_of(Storage storage) { return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2; }

// int64 entries (0: there is no such tensor), offset and strides precede each.
Stored stored(Storage storage, bool given) {
  const auto layout = read<int64_t>(6);
  Stored result{given ? read<unsigned char>(layout[0] * size_of(storage)) : unwritten<unsigned char>(layout[0] * size_of(storage)), {}};
  unsigned char* data = layout[0] ? result.bytes.data() + layout[1] * size_of(storage) : nullptr;
  result.view = {data, storage, layout[2], layout[3], layout[4], layout[5]};
  return result;
}

// In: int64 B, H, n, m, d, storage, masked, seed, drop_below, cut_below, backward, b_parts, h_parts, add_dq, add_dbias, dbias_over_batch,
// blocks; float64 scale, rescale; then layouts and entries of q, k, v, bias (and lse, grad_out), and layouts of out, lse (or dq, dk, dv,
// dbias). Out: these.
template <typename scalar>
int solve() {
  const auto sizes = read<int64_t>(17);
  const auto factors = read<double>(2);
  const auto storage = Storage(sizes[5]), compute = sizeof(scalar) == 8 ? Storage::float64 : Storage::float32;
  const bool backward = sizes[10];
  AttentionBatch x{};
  x.B = sizes[0], x.H = sizes[1], x.n = sizes[2], x.m = sizes[3], x.d = sizes[4];
  x.masked = sizes[6], x.seed_at = &sizes[7], x.drop_below = uint32_t(sizes[8]), x.cut_below = uint32_t(sizes[9]);
  x.b_parts = sizes[11], x.h_parts = sizes[12], x.add_dq = sizes[13], x.add_dbias = sizes[14], x.dbias_over_batch = sizes[15];
  x.scale = factors[0], x.rescale = factors[1];
  std::vector<Stored> in, out;
  for (View* view : {&x.q, &x.k, &x.v, &x.bias}) in.push_back(stored(storage, true)), *view = in.back().view;
  if (backward) {
    in.push_back(stored(compute, true)), x.lse = in.back().view;
    in.push_back(stored(storage, true)), x.grad_out = in.back().view;
    out.push_back(stored(x.add_dq ? compute : storage, false)), x.dq = out.back().view;
    for (View* view : {&x.dk, &x.dv}) out.push_back(stored(storage, false)), *view = out.back().view;
    out.push_back(stored(x.add_dbias ? compute : storage, false)), x.dbias = out.back().view;
  } else {
    out.push_back(stored(storage, false)), x.out = out.back().view;
    out.push_back(stored(compute, false)), x.lse = out.back().view;
  }
  const bool served = with_grid_here<scalar>(x.n, x.m, x.d, [&](auto grid) {
    using Grid = decltype(grid);
    using Team = HostTeam<Grid::kLanes>;
    using Solver = Attention<scalar, Grid, Team>;
    if (Solver::shared_bytes(x, backward) > kSharedBytes<Grid::kLanes>) std::abort();
    auto lanes = std::make_unique<Lanes<Grid::kLanes>>();
    for (int64_t block = 0; block < sizes[16]; ++block) {
      auto memory = unwritten<Bytes::value_type>(Solver::shared_bytes(x, backward));
      lanes->run([&](int lane) {
        Team team(*lanes, lane);
        Solver solver(x, backward, memory.data(), team);
        backward ? solver.backward_share(block, sizes[16]) : solver.forward_share(block, sizes[16]);
      });
    }
  });
  if (!served) return 3;
  for (const Stored& each : out) write(each.bytes);
  return 0;
}

// In: int64 count; then count of seed, problem, row, block. Out: the words of each.
int words() {
  const auto count = read<int64_t>(1)[0];
  const auto counters = read<int64_t>(4 * count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* c = counters.data() + 4 * k;
    uint32_t words[kPhiloxColumns];
    philox_words(PhiloxKeys(uint64_t(c[0])), uint64_t(c[1]), uint32_t(c[2]), uint32_t(c[3]), words);
    write(std::vector<uint32_t>(words, words + kPhiloxColumns));
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  if (!std::strcmp(arguments[1], "philox")) return words();
  return std::strcmp(arguments[1], "float32") ? solve<double>() : solve<float>();
}
