// common/split.h on the host, in whole numbers: what owners hold is their peers' sum, and what they hand back reaches every slot.

#include <cstdint>
#include <memory>

#include "common/split.h"
#include "io.h"
#include "team.h"

namespace {

using namespace helo_fast;

// Each lane gives a number of its own for every entry; the peers of a lane are kStride lanes apart.
template <int kSlots, int kPeers, int kStride>
int32_t mistakes() {
  constexpr int kLanes = kPeers * kStride;
  using Split = helo_fast::Split<kSlots, kPeers, kStride>;
  const auto number = [](int lane, int entry) { return int64_t(1 + lane) * lane * 97 + (entry + 1) * 31 * (lane + 5); };
  int32_t wrong = 0;
  int counted[kSlots] = {};
  auto lanes = std::make_unique<Lanes<kLanes>>();
  lanes->run([&](int lane) {
    HostTeam<kLanes> team(*lanes, lane);
    const int peer = lane / kStride, first = lane % kStride;
    int64_t values[kSlots], owned[Split::kOwned];
    unroll<kSlots>([&](auto slot) { values[slot] = number(lane, Split::entry(slot, peer)); });
    Split::reduce(team, values, owned, Plus());
    Split::for_owned([&](int k, auto slot) {
      const int entry = Split::entry(slot, peer);
      int64_t sum = 0;
      for (int p = 0; p < kPeers; ++p) sum += number(first + p * kStride, entry);
      wrong += owned[k] != sum;
      if (first == 0 && Split::counts(slot, peer)) ++counted[entry];
      owned[k] = 1000 + entry;
    });
    Split::gather(team, owned, values);
    unroll<kSlots>([&](auto slot) { wrong += values[slot] != 1000 + Split::entry(slot, peer); });
    wrong += reduce_all(team, int64_t(lane), Plus()) != kLanes * (kLanes - 1) / 2;
  });
  for (int count : counted) wrong += count != 1;
  return wrong;
}

template <int kPeers, int kStride>
void write_mistakes() {
  write(std::vector<int32_t>{mistakes<1, kPeers, kStride>(), mistakes<2, kPeers, kStride>(), mistakes<5, kPeers, kStride>(),
                             mistakes<9, kPeers, kStride>(), mistakes<16, kPeers, kStride>()});
}

}  // namespace

// Out: int32 for 2, 4, 8 and 16 peers, 1, 1, 4 and 8 lanes apart, by 1, 2, 5, 9 and 16 slots.
int main() {
  write_mistakes<2, 1>(), write_mistakes<4, 1>(), write_mistakes<8, 4>(), write_mistakes<16, 8>();
  return 0;
}
