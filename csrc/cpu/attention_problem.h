// What the torch side of lcd_attention hands to the kernel of whichever instruction set runs.
#pragma once

#include <cstdint>

#include "view.h"

struct AttentionArguments {
  int64_t B, H, n, m, d;
  View q, k, v, bias;  // [n, d], [m, d], [m, d], [n, m] per head
  View out, lse;       // [n, d], [n, 1]; lse is in the compute dtype
  View grad_out;       // the backward's
  View dq, dk, dv, dbias;
  int64_t b_parts, h_parts;  // tasks of the backward: each takes a range of the batch, and one head or (h_parts 1) all
  bool add_dq, add_dbias;    // dq [b_parts, H, n, d] and dbias are sums that tasks add to, in the compute dtype
  bool dbias_over_batch;     // those of dbias are [b_parts, h_parts, n, m], else [B, h_parts, n, m]
  double scale, rescale;     // rescale: of the weights that dropout keeps
  bool masked;
  uint64_t seed;
  int64_t first_problem;           // Philox's, of the first head
  uint32_t drop_below, cut_below;  // T(dropkey_p), T(dropout_p)
};

// What tasks summed, [b_parts, h_parts, size], to a gradient [b_parts or 1, h_parts or 1, size], in their order.
struct AttentionSums {
  const unsigned char* parts;
  int64_t b_parts, h_parts, size;
  unsigned char* total;
  Storage storage;
  int64_t batches, heads;
};

constexpr int64_t kTile = 64;  // rows and columns of the logits at a time

struct AttentionKernel {
  void (*fwd)(const AttentionArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // blocks of kTile rows
  void (*bwd)(const AttentionArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // tasks
  void (*sum)(const AttentionSums&, int64_t begin, int64_t end);                               // entries of total
  int64_t (*scratch_bytes)(int64_t n, int64_t d);
};

// Of float32 and halves on the CPU, for transformer_layer too.
const AttentionKernel& float_attention();
