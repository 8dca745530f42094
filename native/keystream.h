// AES-256 in counter mode by the processor's own instructions, which take the same time whatever key and text are; read
// as words that are residues, see src/tempo/wire/residues.py.
#pragma once

#include "shares_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int64_t kBlockWords = 4;
constexpr int64_t kBatchWords = 128;  // words that are made together: as many blocks as keep the unit for AES busy

#if defined(__AES__)

struct Schedule {
    __m128i keys[15];
};

// The next four words of the schedule, of those eight back and what was made of the last four.
inline __m128i next_keys(__m128i back, __m128i made) {
    back = _mm_xor_si128(back, _mm_slli_si128(back, 4));
    back = _mm_xor_si128(back, _mm_slli_si128(back, 8));
    return _mm_xor_si128(back, made);
}

template <int kRound>
inline void expand_keys(__m128i *keys) {
    constexpr int kConstant = 1 << (kRound / 2 - 1);
    const __m128i turned = _mm_aeskeygenassist_si128(keys[kRound - 1], kConstant);
    keys[kRound] = next_keys(keys[kRound - 2], _mm_shuffle_epi32(turned, 0xff));
    if constexpr (kRound < 14) {
        const __m128i plain = _mm_aeskeygenassist_si128(keys[kRound], 0);
        keys[kRound + 1] = next_keys(keys[kRound - 1], _mm_shuffle_epi32(plain, 0xaa));
        expand_keys<kRound + 2>(keys);
    }
}

inline Schedule schedule(const uint8_t *key) {
    Schedule s;
    std::memcpy(s.keys, key, 32);
    expand_keys<2>(s.keys);
    return s;
}

// Both: `count` words, a multiple of kBatchWords, from block `block` on; true if one is larger than `half`.

inline bool words_by_aes(const Schedule &s, int64_t block, int32_t half, int32_t *to, int64_t count) {
    constexpr int kTogether = 8;
    Integers refused{};
    for (const int32_t *end = to + count; to < end; to += kTogether * kBlockWords, block += kTogether) {
        __m128i state[kTogether];
        for (int i = 0; i < kTogether; ++i)  // a counter is big-endian
            state[i] = _mm_xor_si128(_mm_set_epi64x(int64_t(__builtin_bswap64(uint64_t(block + i))), 0), s.keys[0]);
        for (int round = 1; round < 14; ++round)
            for (int i = 0; i < kTogether; ++i) state[i] = _mm_aesenc_si128(state[i], s.keys[round]);
        for (int i = 0; i < kTogether; ++i) state[i] = _mm_aesenclast_si128(state[i], s.keys[14]);
        std::memcpy(to, state, sizeof state);
        for (int i = 0; i < kTogether * kBlockWords; i += kLanes) {
            const Integers words = load_integers(to + i);
            refused |= (words > half) | (words < -half);
        }
    }
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= refused[lane];
    return any != 0;
}

#if defined(__AVX512F__)
inline __m512i all_blocks(__m128i block) { return _mm512_maskz_broadcast_i32x4(0xffff, block); }

// Not for all of AVX-512: the first processors with it have no such instruction.
__attribute__((target("vaes"))) inline bool words_by_vaes(const Schedule &s, int64_t block, int32_t half, int32_t *to,
                                                          int64_t count) {
    constexpr int kTogether = kBatchWords / kLanes;
    __m512i keys[15];
    for (int round = 0; round < 15; ++round) keys[round] = all_blocks(s.keys[round]);
    const __m512i turn = all_blocks(_mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __m512i counter = _mm512_add_epi64(_mm512_maskz_set1_epi64(0x55, block), _mm512_set_epi64(0, 3, 0, 2, 0, 1, 0, 0));
    const __m512i four = _mm512_maskz_set1_epi64(0x55, 4);
    const __m512i offset = _mm512_set1_epi32(half), most = _mm512_set1_epi32(2 * uint32_t(half));
    __mmask16 refused = 0;
    for (const int32_t *end = to + count; to < end;) {
        __m512i state[kTogether];
        for (int i = 0; i < kTogether; ++i, counter = _mm512_add_epi64(counter, four))
            state[i] = _mm512_xor_si512(_mm512_shuffle_epi8(counter, turn), keys[0]);
        for (int round = 1; round < 14; ++round)
            for (int i = 0; i < kTogether; ++i) state[i] = _mm512_aesenc_epi128(state[i], keys[round]);
        for (int i = 0; i < kTogether; ++i, to += kLanes) {
            state[i] = _mm512_aesenclast_epi128(state[i], keys[14]);
            refused |= _mm512_cmpgt_epu32_mask(_mm512_add_epi32(state[i], offset), most);
            _mm512_storeu_si512(to, state[i]);
        }
    }
    return refused != 0;
}
#endif

inline bool keystream(const Schedule &s, int64_t block, int32_t half, int32_t *to, int64_t count) {
#if defined(__AVX512F__)
    if (__builtin_cpu_supports("vaes")) return words_by_vaes(s, block, half, to, count);
#endif
    return words_by_aes(s, block, half, to, count);
}

constexpr int64_t kCovers = int64_t(1) << 62;  // blocks from here on are for nothing else

// A residue that nobody can tell who has not the seed: for one element, until another one takes its place.
inline int32_t cover(const Schedule &key, int64_t element, int32_t half) {
    int32_t words[kBatchWords];
    keystream(key, kCovers + element, half, words, kBatchWords);
    int i = 0;
    while (words[i] > half || words[i] < -half) ++i;
    return words[i];
}

// Reports what was refused of `count` words from element `first` on, and puts zeros there, or with a `key`, covers.
inline void refuse(const Refusals &refusals, int seed, int64_t first, int32_t half, int32_t *words, int64_t count,
                   const Schedule *key = nullptr) {
    for (int64_t i = 0; i < count; ++i)
        if (words[i] > half || words[i] < -half) {
            words[i] = key ? cover(*key, first + i, half) : 0;
            refusals.report(refusals.to, seed, first + i, words[i]);
        }
}

inline void expand(const Expansion &e) {
    const Schedule keys = schedule(e.seed);
    const int64_t whole = e.count / kBatchWords * kBatchWords;
    if (keystream(keys, e.block, e.half, e.out, whole))
        refuse(e.refusals, 0, e.block * kBlockWords, e.half, e.out, whole);
    if (whole == e.count) return;
    int32_t last[kBatchWords];
    const int64_t block = e.block + whole / kBlockWords, left = e.count - whole;
    if (keystream(keys, block, e.half, last, kBatchWords))
        refuse(e.refusals, 0, block * kBlockWords, e.half, last, left);
    std::memcpy(e.out + whole, last, left * sizeof *last);
}

#endif

}  // namespace tempo::TEMPO_ISA
