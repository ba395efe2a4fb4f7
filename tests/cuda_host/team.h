// A team of lanes for csrc/common on a CPU: each lane is a context of its own, and they take turns, in an order that changes at every
// meeting, so that what a missing sync() would leave to chance is left to chance here too. Stops the program where two lanes meet in
// different calls, or one ends while another waits.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define HELO_FAST_ANNOTATE(call) call
#else
#define HELO_FAST_ANNOTATE(call)
#endif

// Leaves a context for another, to come back here: swapcontext() without its system calls, twenty times as fast.
using Place = void* [5];
#define HELO_FAST_SWITCH __attribute__((noinline, noclone, no_sanitize("address", "undefined"))) inline
HELO_FAST_SWITCH void go_to(Place& there) { __builtin_longjmp(there, 1); }
HELO_FAST_SWITCH void leave_for(Place& here, Place& there) {
  if (!__builtin_setjmp(here)) go_to(there);
}
HELO_FAST_SWITCH void leave_for(Place& here, const ucontext_t* there) {
  if (!__builtin_setjmp(here)) setcontext(there);
}

template <int lanes>
class Lanes {
 public:
  static constexpr size_t kStack = 256 * 1024;

  // body(lane) on every lane, to its end.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    ended_ = 0;
    started_ = false;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!stacks_[lane]) stacks_[lane] = std::make_unique<char[]>(kStack);
      getcontext(&contexts_[lane]);
      contexts_[lane].uc_stack.ss_sp = stacks_[lane].get();
      contexts_[lane].uc_stack.ss_size = kStack;
      contexts_[lane].uc_link = nullptr;
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&contexts_[lane], reinterpret_cast<void (*)()>(&Lanes::begin), 3, unsigned(self), unsigned(self >> 32), lane);
    }
    while (ended_ == 0) turn();
    if (ended_ != lanes) fail("a lane ended while others wait");
  }

  // Waits until every lane calls it, with the same words.
  void meet(int lane, const char* call, int detail) {
    call_[lane] = call, detail_[lane] = detail;
    leave(lane, false);
  }

  unsigned char store[2][lanes][16];  // what the lanes give each other; used in turn

 private:
  static void begin(unsigned low, unsigned high, int lane) {
    auto* self = reinterpret_cast<Lanes*>(uintptr_t(low) | uintptr_t(high) << 32);
    HELO_FAST_ANNOTATE(__sanitizer_finish_switch_fiber(nullptr, &self->main_stack_, &self->main_size_));
    (*self->body_)(lane);
    self->call_[lane] = "end", self->detail_[lane] = 0;
    ++self->ended_;
    self->leave(lane, true);
  }

  void leave(int lane, bool forever) {
    void* fake = nullptr;
    (void)fake, (void)forever;
    HELO_FAST_ANNOTATE(__sanitizer_start_switch_fiber(forever ? nullptr : &fake, main_stack_, main_size_));
    leave_for(places_[lane], main_);
    HELO_FAST_ANNOTATE(__sanitizer_finish_switch_fiber(fake, &main_stack_, &main_size_));
  }

  // Every lane runs to its next meeting.
  void turn() {
    seed_ = seed_ * 1664525 + 1013904223;
    const int first = seed_ >> 8 & (lanes - 1), step = seed_ >> 16 | 1;
    for (int k = 0; k < lanes; ++k) {
      const int lane = (first + k * step) & (lanes - 1);
      void* fake = nullptr;
      (void)fake;
      HELO_FAST_ANNOTATE(__sanitizer_start_switch_fiber(&fake, stacks_[lane].get(), kStack));
      started_ ? leave_for(main_, places_[lane]) : leave_for(main_, &contexts_[lane]);
      HELO_FAST_ANNOTATE(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr));
    }
    started_ = true;
    for (int lane = 1; lane < lanes; ++lane)
      if (call_[lane] != call_[0] || detail_[lane] != detail_[0]) fail("lanes meet in different calls");
  }

  [[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s: %s(%d) on lane 0\n", what, call_[0], detail_[0]);
    for (int lane = 1; lane < lanes; ++lane)
      if (call_[lane] != call_[0] || detail_[lane] != detail_[0])
        std::fprintf(stderr, "  %s(%d) on lane %d\n", call_[lane], detail_[lane], lane);
    std::abort();
  }

  const std::function<void(int)>* body_ = nullptr;
  int ended_ = 0;
  unsigned seed_ = 1;
  bool started_ = false;
  ucontext_t contexts_[lanes];
  Place main_, places_[lanes];
  std::unique_ptr<char[]> stacks_[lanes];
  const char* call_[lanes];
  int detail_[lanes];
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

// What a block may have on sm_80 beside the shared memory that its lanes exchange through (Block::Shared of csrc/cuda/team.h).
template <int lanes>
constexpr int64_t kSharedBytes = 163 * 1024 - (lanes == 32 ? 0 : 2 * lanes * int64_t(sizeof(double)));

// What one lane sees.
template <int lanes>
class HostTeam {
 public:
  static constexpr int kLanes = lanes;

  HostTeam(Lanes<lanes>& all, int lane) : all_(all), lane_(lane) {}
  int lane() const { return lane_; }
  void sync() { all_.meet(lane_, "sync", 0); }

  template <typename T>
  T exchange(T value, int mask) {
    static_assert(sizeof(T) <= 16);
    auto* values = all_.store[turn_ ^= 1];
    std::memcpy(values[lane_], &value, sizeof(T));
    all_.meet(lane_, "exchange", mask * 32 + int(sizeof(T)));
    std::memcpy(&value, values[lane_ ^ mask], sizeof(T));
    return value;
  }

  bool any(bool condition) {
    auto* values = all_.store[turn_ ^= 1];
    values[lane_][0] = condition;
    all_.meet(lane_, "any", 0);
    bool found = false;
    for (int lane = 0; lane < lanes; ++lane) found |= values[lane][0] != 0;
    return found;
  }

  // What is copied in stands there only after await_copies().
  template <int bytes>
  void copy_in(void* to, const void* from) {
    check_aligned<bytes>(to, from);
    Copy copy{to, {}, bytes};
    std::memcpy(copy.bytes, from, bytes);
    copies_.push_back(copy);
  }
  void await_copies() {
    for (const Copy& copy : copies_) std::memcpy(copy.to, copy.bytes, copy.size);
    copies_.clear();
    all_.meet(lane_, "await_copies", 0);
  }
  template <int bytes>
  void copy_out(void* to, const void* from) {
    check_aligned<bytes>(to, from);
    std::memcpy(to, from, bytes);
  }

 private:
  struct Copy {
    void* to;
    unsigned char bytes[16];
    int size;
  };

  template <int bytes>
  static void check_aligned(const void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0) return;
    std::fprintf(stderr, "a copy of %d bytes is not aligned\n", bytes);
    std::abort();
  }

  Lanes<lanes>& all_;
  const int lane_;
  int turn_ = 0;
  std::vector<Copy> copies_;
};
