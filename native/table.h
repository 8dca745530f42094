// What every instruction set provides: `kernels.cpp` is compiled once for each and fills one table.
#pragma once

#include "haar_types.h"
#include "sandwich_types.h"
#include "sums_types.h"
#include "layers_types.h"
#include "lanczos_types.h"
#include "low_rank_types.h"
#include "patches_types.h"
#include "shares_types.h"
#include "zeros_types.h"

namespace tempo {

struct Table {
    const char *name;
    void (*sandwich)(const Sandwich &);
    void (*sums)(const Sums &);
    void (*compare)(Comparison &);
    double (*taps)(const Taps &);
    void (*gaussians)(double *numbers, int64_t half);
    void (*gaussians_single)(float *numbers, int64_t half);
    void (*orthogonal)(const Haar<double> &);
    void (*orthogonal_single)(const Haar<float> &);
    void (*activation)(Activation kind, const float *x, const float *g, float *out, int64_t size);
    void (*gated)(Activation kind, const float *x, const float *up, const float *g, float *out, float *dup, int64_t size);
    void (*rms_norm)(const RmsNorm &);
    void (*sum_channels)(const ChannelSums &);
    void (*normalize)(const Normalization &);
    void (*rotate)(const Rotation &);
    void (*attend)(const Attention &);
    void (*differentiate_attention)(const Attention &);
    void (*tall_products)(const Tall &);
    void (*lanczos)(const Lanczos &);
    void (*make_patches)(const Patches &, const float *maps, float *patches);
    void (*add_patches)(const Patches &, const float *patches, float *maps);
    void (*dead_rows)(const Zeros &, bool *dead);
    void (*dead_columns)(const Zeros &, bool *dead, int32_t *candidates);
    void (*sum_rows)(const FieldRows &);
    void (*combine)(const Combination &);
    void (*expand)(const Expansion &);  // this and the next are null without instructions for AES
    void (*share)(const Shares &);
};

#define TEMPO_FOR_EACH_ISA(apply) apply(generic) apply(avx2) apply(avx512) apply(amx)
#define TEMPO_DECLARE(isa) \
    namespace isa {        \
    const Table &table();  \
    }
TEMPO_FOR_EACH_ISA(TEMPO_DECLARE)
#undef TEMPO_DECLARE

}  // namespace tempo
