// What the torch side of transformer_layer hands to the kernel of whichever instruction set runs.
#pragma once

#include <cstdint>

#include "attention_problem.h"
#include "residual_norm_problem.h"

constexpr int64_t kNormSlices = 8;  // of a chunk, in the norms' backward

// All in float32, contiguous; width and hidden are multiples of 16.
struct TransformerArguments {
  int64_t batch, sets, tokens, width, hidden;  // batch: of samples and sets together; sets: 1, or 2 of tokens that samples have
  int64_t samples;                             // of a chunk, the last of which may have fewer
  AttentionArguments attention;                // of the whole batch, as are
  ResidualNormArguments first_norm, last_norm;  // those after attention and after the feed-forward map
  const AttentionKernel* attend;
  const ResidualNormKernel* normalise;
  const float* x[2];                                         // the sets, [B / sets, n, D] each: sample, then set counts in all else
  const float *projections, *w1, *w2, *b1, *b2;              // projections: those to q, k and v, one under the other [3 D, D]
  const float *projections_t, *w1_t, *w2_t;                  // transposed: [D, 3 D], [D, F], [F, D]
  float *projected, *attended, *between, *inner, *returned;  // q, k, v [B, n, 3 D]; [B, n, D]; after the first norm; [B, n, F]; [B, n, D]
  float* dx[2];                                              // the backward's
  float* parts;                                              // [tasks, part] sums for the gradients of projections, w1, w2, b1, b2
  int64_t tasks;                                             // by the shapes alone: the bits do not depend on the threads
};

struct TransformerKernel {
  void (*transpose)(const float* from, int64_t rows, int64_t columns, float* to);
  void (*fwd)(const TransformerArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // chunks
  void (*bwd)(const TransformerArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // tasks
  // Entries [begin, end) of a gradient, which stands in a part from entry `first` on, over the tasks.
  void (*sum)(const TransformerArguments&, int64_t first, float* total, int64_t begin, int64_t end);
  int64_t (*scratch_bytes)(const TransformerArguments&, bool backward);
};

// The pieces of a part, in their order.
struct TransformerPart {
  int64_t projections, w1, w2, b1, b2;
  explicit TransformerPart(int64_t width, int64_t hidden)
      : projections(3 * width * width), w1(hidden * width), w2(width * hidden), b1(hidden), b2(width) {}
  int64_t size() const { return projections + w1 + w2 + b1 + b2; }
};
