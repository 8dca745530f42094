// Sums of an answer's rows against those expected: the worst row, relative to its tolerance (tempo.verify.tolerance).
//
// Squares are compared: of floats and of products of their lengths they stay in double's range.
#pragma once

#include <cfloat>

#include "sums_types.h"

namespace tempo::TEMPO_ISA {

constexpr int kCompared = 256;  // rows at a time

inline void compare(Comparison &c) {
    double off[kCompared], scale[kCompared], allowed[kCompared], ratio[kCompared];
    double worst = -1;
    for (int64_t group = 0; group < c.groups; ++group)
        for (int64_t start = 0; start < c.rows; start += kCompared) {
            const int count = int(c.rows - start < kCompared ? c.rows - start : kCompared);
            const int64_t first = group * c.rows + start;
            for (int i = 0; i < count; ++i) off[i] = 0;
            for (int k = 0; k < c.vectors; ++k) {
                const int64_t at = (group * c.vectors + k) * c.rows + start;
                const float *found = c.found + at, *expected = c.expected + at;
                for (int i = 0; i < count; ++i) {
                    const double difference = found[i] - expected[i];
                    off[i] += difference * difference;
                }
            }
            const double *lengths = c.lengths + first, *answers = c.answers + first;
            for (int i = 0; i < count; ++i) {
                scale[i] = lengths[i] * c.other[group];
                allowed[i] = scale[i] * c.of_scale;
            }
            if (c.of_rounded > 0)
                for (int i = 0; i < count; ++i) {
                    const double rounded = answers[i] * c.of_rounded;
                    allowed[i] = __builtin_sqrt(allowed[i] * allowed[i] + rounded * rounded);
                }
            for (int i = 0; i < count; ++i) allowed[i] += answers[i] * c.of_answer + c.lost;
            for (int i = 0; i < count; ++i) {
                const double drifted = lengths[i] * c.drift;
                allowed[i] = (allowed[i] * allowed[i] + drifted * drifted) * (c.threshold * c.threshold);
                ratio[i] = off[i] / allowed[i];
            }
            for (int i = 0; i < count; ++i) {
                const bool finite = off[i] <= DBL_MAX && allowed[i] <= DBL_MAX;
                if (finite && ratio[i] <= worst) continue;
                const bool free = !finite && !(scale[i] < c.limit);
                c.unchecked += free;
                const double found = free ? 0 : finite ? ratio[i] : __builtin_inf();
                if (found <= worst) continue;
                worst = found;
                c.worst = first + i, c.residual = __builtin_sqrt(off[i]), c.tolerance = __builtin_sqrt(allowed[i]);
            }
        }
    c.ratio = __builtin_sqrt(worst);
}

}  // namespace tempo::TEMPO_ISA
