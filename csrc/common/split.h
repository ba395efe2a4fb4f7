// How `kPeers` lanes (a power of two), each with a part of kSlots sums, come to the sums and to quotients by them.
//
// Slots form groups: as many of kPeers as fit, the rest of powers of two, the largest first (9 slots of 8 peers: 8 + 1). Slot p of a
// group belongs to entry p ^ (peer mod its size), so that each peer keeps the first slot and sends what others need in the same
// registers as they do: no lane has to choose. After reduce() a peer owns one entry of each group (where the group is smaller than the
// peers, several own the same one, bit for bit); gather() hands what the owners made of them back to all slots. Both take fewer
// exchanges than a full reduction of every slot: 10 and 7 for 9 slots of 8 peers, in place of 27 and none, and a ninth of the divisions.
#pragma once

#include <cstdint>

#include "hd.h"

namespace helo_fast {

struct Plus {
  template <typename T>
  HELO_FAST_HD T operator()(T x, T y) const {
    return x + y;
  }
};

struct Larger {
  template <typename T>
  HELO_FAST_HD T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

// The sizes of the groups.
template <int kSlots, int kPeers>
struct Groups {
  HELO_FAST_HD static constexpr int size_from(int start) {
    int size = kPeers;
    while (size > kSlots - start) size /= 2;
    return size;
  }
  HELO_FAST_HD static constexpr int start(int slot) {
    int from = 0;
    while (slot >= from + size_from(from)) from += size_from(from);
    return from;
  }
  HELO_FAST_HD static constexpr int size(int slot) { return size_from(start(slot)); }
  // How many start before this slot.
  HELO_FAST_HD static constexpr int before(int slot) {
    int count = 0;
    for (int from = 0; from < slot; from += size_from(from)) ++count;
    return count;
  }
};

template <int kSlots, int kPeers, int kPeerStride>  // peers are kPeerStride lanes apart
struct Split {
  using Groups = helo_fast::Groups<kSlots, kPeers>;
  static constexpr int kOwned = Groups::before(kSlots);

  // The entry, 0 to kSlots - 1, that stands in a peer's slot (a constant); what a peer owns is in the slots that start a group.
  template <typename Slot>
  HELO_FAST_HD static int entry(Slot, int peer) {
    constexpr int start = Groups::start(Slot()), size = Groups::size(Slot());
    return start + ((Slot() - start) ^ (peer & (size - 1)));
  }

  // body(k, slot) for the k-th owned entry.
  template <typename Body>
  HELO_FAST_HD static void for_owned(const Body& body) {
    unroll<kSlots>([&](auto slot) {
      if constexpr (slot == Groups::start(slot)) body(Groups::before(slot), slot);
    });
  }

  // Whether this peer counts in a sum over what is owned: each entry once.
  template <typename Slot>
  HELO_FAST_HD static bool counts(Slot, int peer) {
    return peer < Groups::size(Slot());
  }

  template <int bit = 1, typename Team, typename T, typename Operation>
  HELO_FAST_HD static void reduce(Team& team, T (&values)[kSlots], T (&owned)[kOwned], Operation operation) {
    if constexpr (bit < kPeers) {
      unroll<kSlots>([&](auto slot) {
        constexpr int size = Groups::size(slot), p = slot - Groups::start(slot);
        if constexpr (bit < size && p % (2 * bit) == 0)
          values[slot] = operation(values[slot], team.exchange(values[slot + bit], bit * kPeerStride));
        else if constexpr (bit >= size && p == 0)
          values[slot] = operation(values[slot], team.exchange(values[slot], bit * kPeerStride));
      });
      reduce<2 * bit>(team, values, owned, operation);
    } else {
      for_owned([&](int k, auto slot) { owned[k] = values[slot]; });
    }
  }

  template <int bit = kPeers / 2, typename Team, typename T>
  HELO_FAST_HD static void gather(Team& team, const T (&owned)[kOwned], T (&values)[kSlots]) {
    if constexpr (bit == kPeers / 2) for_owned([&](int k, auto slot) { values[slot] = owned[k]; });
    unroll<kSlots>([&](auto slot) {
      if constexpr (bit < Groups::size(slot) && (slot - Groups::start(slot)) % (2 * bit) == 0)
        values[slot + bit] = team.exchange(values[slot], bit * kPeerStride);
    });
    if constexpr (bit > 1) gather<bit / 2>(team, owned, values);
  }
};

// Over all lanes of a team, known to each of them.
template <typename Team, typename T, typename Operation>
HELO_FAST_HD T reduce_all(Team& team, T value, Operation operation) {
  HELO_FAST_UNROLL
  for (int mask = 1; mask < Team::kLanes; mask *= 2) value = operation(value, team.exchange(value, mask));
  return value;
}

}  // namespace helo_fast
