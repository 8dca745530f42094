// All kernels for one instruction set, TEMPO_ISA.
#include "table.h"

#include "haar.h"
#include "sandwich.h"
#include "sums.h"
#include "compare.h"
#include "taps.h"
#include "activation.h"
#include "attention.h"
#include "batch_norm.h"
#include "rms_norm.h"
#include "rotation.h"
#include "lanczos.h"
#include "low_rank.h"
#include "patches.h"
#include "shares.h"
#include "zeros.h"

#define TEMPO_STRING(x) #x
#define TEMPO_NAME(x) TEMPO_STRING(x)

namespace tempo::TEMPO_ISA {

const Table &table() {
    static const Table found{
        .name = TEMPO_NAME(TEMPO_ISA),
        .sandwich = sandwich,
        .sums = sums,
        .compare = compare,
        .taps = taps,
        .gaussians = gaussians,
        .gaussians_single = gaussians_single,
        .orthogonal = orthogonal,
        .orthogonal_single = orthogonal_single,
        .activation = activation,
        .gated = gated,
        .rms_norm = rms_norm,
        .sum_channels = sum_channels,
        .normalize = normalize,
        .rotate = rotate,
        .attend = attend,
        .differentiate_attention = differentiate_attention,
        .tall_products = tall_products,
        .lanczos = lanczos,
        .make_patches = make_patches,
        .add_patches = add_patches,
        .dead_rows = dead_rows,
        .dead_columns = dead_columns,
        .sum_rows = sum_rows,
        .combine = combine,
#if defined(__AES__)
        .expand = expand,
        .share = share,
#else
        .expand = nullptr,
        .share = nullptr,
#endif
    };
    return found;
}

}  // namespace tempo::TEMPO_ISA
