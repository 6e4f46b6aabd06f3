// Attention in one pass over blocks that stay in the cache: softmax(q k^T * scale) v, a head at a time.
//
// For processors with AVX-512, in float32, and in bfloat16 where they multiply it (AVX512_BF16). kernel.py compiles this
// file and calls `attend`.
//
// The method is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, algorithm 1): ROWS queries meet COLUMNS keys at a time;
// beside the output so far stand, for each query, the largest score m and the sum l of exp(score - m). A block with a larger
// score scales what is there by exp(m - m_new).
//
// A "unit" is 32 bits: one float32, or two neighbouring bfloat16 numbers, which the processor multiplies and adds as a pair.
// Keys and values are laid out in units first, so that both products are the same loop (`product`) in either precision:
//     keys    unit (j, t) = numbers 2t, 2t+1 of key j               as [64 keys][t][j]
//     values  unit (t, c) = number c of values 2t and 2t+1          as [t][c], c filled up to a multiple of 16

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr long LANES = 16;                  // units in a register
constexpr long TILE = 6;                    // queries whose sums are in registers at once, with up to 4 registers each
constexpr long ROWS = 8 * TILE;             // queries in a block
constexpr long GROUP = 4 * LANES;           // keys in a tile
constexpr long COLUMNS = 8 * GROUP;         // keys in a block

constexpr long up(long n, long step) { return (n + step - 1) / step * step; }

// acc + unit * vector, lane by lane.
template <bool pairs>
inline __m512 multiply_add(__m512 acc, uint32_t unit, const uint32_t* vector) {
    const __m512i x = _mm512_set1_epi32(unit), y = _mm512_loadu_si512(vector);
#ifdef __AVX512BF16__
    if constexpr (pairs) return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), acc);
}

// out[TILE][width * LANES] (+)= a[TILE][depth] b[depth][width * LANES], a and b in units; the strides are those of rows.
template <bool pairs, int width>
void tile(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
          bool add) {
    __m512 acc[TILE][width];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < width; j++)
            acc[i][j] = add ? _mm512_loadu_ps(out + i * out_stride + j * LANES) : _mm512_setzero_ps();
    for (long t = 0; t < depth; t++)
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j < width; j++)
                acc[i][j] = multiply_add<pairs>(acc[i][j], a[i * a_stride + t], b + t * b_stride + j * LANES);
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < width; j++) _mm512_storeu_ps(out + i * out_stride + j * LANES, acc[i][j]);
}

// The same for ROWS rows and any number of columns that is a multiple of LANES.
template <bool pairs>
void product(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
             long columns, bool add) {
    for (long column = 0; column < columns; column += 4 * LANES) {
        const long left = (columns - column) / LANES;
        const auto one = left >= 4 ? tile<pairs, 4> : left == 3 ? tile<pairs, 3> : left == 2 ? tile<pairs, 2> : tile<pairs, 1>;
        for (long row = 0; row < ROWS; row += TILE)
            one(a + row * a_stride, a_stride, b + column, b_stride, depth, out + row * out_stride + column, out_stride, add);
    }
}

// 2^x for x <= 0, to 2 in 10^7: 2^round(x) times a polynomial of the rest, in [-1/2, 1/2] (the Taylor series of e^(x ln 2)).
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

template <bool pairs>
inline void store(void* to, __m512 x, __mmask16 which) {
#ifdef __AVX512BF16__
    if constexpr (pairs) return _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(x));
#endif
    _mm512_mask_storeu_ps(to, which, x);
}

// Scores of one query against `count` keys (a multiple of LANES) -> their exponentials, and m, l and the output so far to match.
template <bool pairs>
void exponentials(const float* scores, void* out, long count, float scale, float& m, float& l, float* sofar, long width) {
    __m512 largest = _mm512_set1_ps(m);
    for (long j = 0; j < count; j += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + j));
    const float before = m;
    m = _mm512_reduce_max_ps(largest);
    const __m512 by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(m * scale);
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < count; j += LANES) {
        const __m512 p = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), by, shift));
        sum = _mm512_add_ps(sum, p);
        store<pairs>((char*)out + j * (pairs ? 2 : 4), p, 0xffff);
    }
    if (m > before) {
        const float shrink = std::exp2((before - m) * scale);
        l *= shrink;
        for (long c = 0; c < width; c += LANES)
            _mm512_storeu_ps(sofar + c, _mm512_mul_ps(_mm512_loadu_ps(sofar + c), _mm512_set1_ps(shrink)));
    }
    l += _mm512_reduce_add_ps(sum);
}

// A tensor (B, heads, length, d) whose last dimension lies together; strides count numbers.
struct View {
    char* data;
    long batch, head, row;
};

template <bool pairs>
struct Work {
    static constexpr long SIZE = pairs ? 2 : 4, STEP = pairs ? 2 : 1;            // bytes of a number, numbers in a unit

    View q, k, v, out;
    long heads, n, m, d;
    float scale;                                                                // of the exponent in base 2
    long depth = d / STEP, width = up(d, LANES), keys = up(m, GROUP);
    std::vector<uint32_t> packed_k, packed_v;                                   // of all heads

    char* at(const View& x, long which, long row) const {
        return x.data + (which / heads * x.batch + which % heads * x.head + row * x.row) * SIZE;
    }
    uint32_t* k_of(long which) { return packed_k.data() + which * keys * depth; }
    uint32_t* v_of(long which) { return packed_v.data() + which * keys / STEP * width; }

    void pack(long which) {
        uint32_t *to_k = k_of(which), *to_v = v_of(which);
        for (long j = 0; j < m; j++) {
            const char *key = at(k, which, j), *value = at(v, which, j);
            for (long t = 0; t < depth; t++) std::memcpy(to_k + j / GROUP * depth * GROUP + t * GROUP + j % GROUP, key + 4 * t, 4);
            char* row = (char*)(to_v + j / STEP * width) + j % STEP * SIZE;
            for (long c = 0; c < d; c++) std::memcpy(row + 4 * c, value + SIZE * c, SIZE);
        }
    }

    void block(long which, long first) {
        thread_local std::vector<float> scores(ROWS * COLUMNS), weights(ROWS * COLUMNS), sofar;
        thread_local std::vector<uint32_t> queries;
        queries.assign(ROWS * depth, 0);
        sofar.assign(ROWS * width, 0);
        float largest[ROWS], sums[ROWS] = {};
        const long rows = std::min(ROWS, n - first);
        for (long i = 0; i < ROWS; i++) largest[i] = std::numeric_limits<float>::lowest();
        for (long i = 0; i < rows; i++) std::memcpy(&queries[i * depth], at(q, which, first + i), d * SIZE);

        for (long start = 0; start < m; start += COLUMNS) {
            const long count = std::min(COLUMNS, keys - start), real = std::min(count, m - start);
            for (long j = 0; j < count; j += GROUP)
                product<pairs>(queries.data(), depth, k_of(which) + (start + j) * depth, GROUP, depth, &scores[j], COLUMNS,
                               GROUP, false);
            for (long i = 0; i < ROWS; i++) {
                for (long j = real; j < count; j++) scores[i * COLUMNS + j] = -std::numeric_limits<float>::infinity();
                exponentials<pairs>(&scores[i * COLUMNS], &weights[i * COLUMNS / STEP], count, scale, largest[i], sums[i],
                                    &sofar[i * width], width);
            }
            product<pairs>((uint32_t*)weights.data(), COLUMNS / STEP, v_of(which) + start / STEP * width, width, count / STEP,
                           sofar.data(), width, width, true);
        }
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < d; c += LANES) {
                const __m512 x = _mm512_div_ps(_mm512_loadu_ps(&sofar[i * width + c]), _mm512_set1_ps(sums[i]));
                store<pairs>(at(out, which, first + i) + c * SIZE, x, (__mmask16)((1u << std::min(LANES, d - c)) - 1));
            }
    }

    void run(long batch, long threads) {
        const long all = batch * heads, blocks = (n + ROWS - 1) / ROWS;
        packed_k.assign(all * keys * depth, 0);
        packed_v.assign(all * keys / STEP * width, 0);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long i = 0; i < all; i++) pack(i);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long i = 0; i < all * blocks; i++) block(i / blocks, i % blocks * ROWS);
    }
};

}  // namespace

// bits: 32 or 16. strides: batch, head and row of q, k, v and out. 0: done; 1: not what this was compiled for.
extern "C" int attend(int bits, void* q, void* k, void* v, void* out, const long* strides, long batch, long heads, long n,
                      long m, long d, double scale, long threads) {
    const auto view = [&](void* data, int i) { return View{(char*)data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    const float in_base_2 = (float)(scale * 1.4426950408889634);
    if (bits == 32)
        Work<false>{view(q, 0), view(k, 1), view(v, 2), view(out, 3), heads, n, m, d, in_base_2}.run(batch, threads);
#ifdef __AVX512BF16__
    else if (bits == 16 && d % 2 == 0)
        Work<true>{view(q, 0), view(k, 1), view(v, 2), view(out, 3), heads, n, m, d, in_base_2}.run(batch, threads);
#endif
    else
        return 1;
    return 0;
}
