// Kernels for processors with AVX-512, in float32, and in bfloat16 where they multiply it (AVX512_BF16). building.py
// compiles this file; kernels.py calls what stands at its end. Attention can multiply by AMX (AMX_BF16). First the helpers, then
// a section for each kernel:
//
//     attend      out = softmax(q k^T scale) v, in one pass over blocks that stay in the cache; attend_back, its gradients
//     linear      y = x W^T + b, for few rows, where oneDNN takes longer to start than to multiply
//     layer_norm  y = (x - mean) / sqrt(variance + eps) * weight + bias, of each row
//     norm_silu   y = z / (1 + e^-z), z = GroupNorm(x + shift), over channels-last maps, in two passes; norm_silu_back
//     geglu       y = value * gate * Phi(gate), and its gradients
//
// A "unit" is 32 bits: one float32, or two neighbouring bfloat16 numbers, which the processor multiplies and adds as a pair.
// What stands on the right of a product is laid out in units first, so that it is the same loop (`tile`) in either precision.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define HAS_AMX
#endif

namespace {

// ---- helpers

constexpr long LANES = 16;                  // units in a register
constexpr long TILE = 6;                    // queries whose sums are in registers at once, with up to 4 registers each
constexpr long GROUP = 4 * LANES;           // keys in a tile
constexpr long COLUMNS = 8 * GROUP;         // keys in a block
constexpr long MUCH = 1 << 20;              // multiplications from which on a second thread pays

constexpr long up(long n, long step) { return (n + step - 1) / step * step; }

// work(i) for each i below count, in so many threads, which no exception may leave: std::bad_alloc after them, where one of
// them had no memory.
template <class Work>
void in_threads(long count, long threads, Work work) {
    std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long i = 0; i < count; i++) {
        try {
            if (!failed) work(i);
        } catch (const std::exception&) {
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

// 0, or 1 where there was no memory for it: what is called from Python throws nothing.
template <class Work>
int status_of(Work work) {
    try {
        work();
    } catch (const std::exception&) {
        return 1;
    }
    return 0;
}

// acc + unit * vector, lane by lane.
template <bool pairs>
inline __m512 multiply_add(__m512 acc, uint32_t unit, const uint32_t* vector) {
    const __m512i x = _mm512_set1_epi32(unit), y = _mm512_loadu_si512(vector);
#ifdef __AVX512BF16__
    if constexpr (pairs) return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), acc);
}

// out[rows][width * LANES] (+)= a[rows][depth] b[depth][width * LANES], a and b in units; the strides are those of rows.
template <bool pairs, int width, int rows>
void tile(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
          bool add) {
    __m512 acc[rows][width];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < width; j++)
            acc[i][j] = add ? _mm512_loadu_ps(out + i * out_stride + j * LANES) : _mm512_setzero_ps();
    for (long t = 0; t < depth; t++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < width; j++)
                acc[i][j] = multiply_add<pairs>(acc[i][j], a[i * a_stride + t], b + t * b_stride + j * LANES);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < width; j++) _mm512_storeu_ps(out + i * out_stride + j * LANES, acc[i][j]);
}

// The tile for `left` registers of columns, at most 4.
template <bool pairs, int rows>
auto tile_for(long left) {
    return left >= 4   ? tile<pairs, 4, rows>
           : left == 3 ? tile<pairs, 3, rows>
           : left == 2 ? tile<pairs, 2, rows>
                       : tile<pairs, 1, rows>;
}

// The same for any number of rows and columns (a multiple of 16), and with room after the last row for a whole tile.
template <bool pairs>
void product(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
             long rows, long columns, bool add) {
    for (long c = 0; c < columns; c += GROUP)
        for (long i = 0; i < rows; i += TILE)
            tile_for<pairs, TILE>((columns - c) / LANES)(a + i * a_stride, a_stride, b + c, b_stride, depth,
                                                         out + i * out_stride + c, out_stride, add);
}

#ifdef HAS_AMX
// By AMX, in bfloat16: eight registers of 16 rows of 16 units, here 0 to 3 for sums, 4 and 5 for rows of a, 6 and 7 for columns
// of b. depth is a multiple of 16, and there is room for 32 rows. A thread has a `Tiles` while it multiplies.
struct Tiles {
    Tiles() {
        alignas(64) static const uint8_t all_of_16_by_64_bytes[64] = {
            1, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
            0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(all_of_16_by_64_bytes);
    }
    ~Tiles() { _tile_release(); }
};

template <bool wide>
void four_tiles(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
                bool add) {
    const long a_bytes = 4 * a_stride, b_bytes = 4 * b_stride, out_bytes = 4 * out_stride;
    float* below = out + LANES * out_stride;
    asm volatile("" ::: "memory");                          // GCC's intrinsics do not say that they read memory
    if (add) {
        _tile_loadd(0, out, out_bytes);
        _tile_loadd(2, below, out_bytes);
        if constexpr (wide) {
            _tile_loadd(1, out + LANES, out_bytes);
            _tile_loadd(3, below + LANES, out_bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long t = 0; t < depth; t += LANES) {
        _tile_loadd(4, a + t, a_bytes);
        _tile_loadd(5, a + LANES * a_stride + t, a_bytes);
        _tile_loadd(6, b + t * b_stride, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (wide) {
            _tile_loadd(7, b + t * b_stride + LANES, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(2, below, out_bytes);
    if constexpr (wide) {
        _tile_stored(1, out + LANES, out_bytes);
        _tile_stored(3, below + LANES, out_bytes);
    }
}

void product_by_amx(const uint32_t* a, long a_stride, const uint32_t* b, long b_stride, long depth, float* out, long out_stride,
                    long rows, long columns, bool add) {
    for (long c = 0; c < columns; c += 2 * LANES)
        for (long i = 0; i < rows; i += 2 * LANES) {
            const auto some = columns - c >= 2 * LANES ? four_tiles<true> : four_tiles<false>;
            some(a + i * a_stride, a_stride, b + c, b_stride, depth, out + i * out_stride + c, out_stride, add);
        }
}
#endif

// 2^x, to 2 in 10^7: 2^round(x) times a polynomial of the rest, in [-1/2, 1/2] (the Taylor series of e^(x ln 2)).
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

// The normal distribution and its density: Abramowitz & Stegun 7.1.26, to 1.5 in 10^7.
inline __m512 normal(__m512 x, __m512& density) {
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 y = _mm512_set1_ps(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c));
    const __m512 tail = exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)));     // e^(-x^2 / 2)
    const __m512 beyond = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_mul_ps(y, t)), tail);  // of -|x|
    density = _mm512_mul_ps(tail, _mm512_set1_ps(0.39894228f));
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_sub_ps(beyond, above, one, beyond);
}

inline __m512 gelu(__m512 x) {
    __m512 density;
    return _mm512_mul_ps(x, normal(x, density));
}

// 16 numbers of either precision, from memory and to it; all, or those in a mask.
template <bool pairs>
inline __m512 load(const void* from, __mmask16 which = 0xffff) {
    if constexpr (pairs)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16));
    return _mm512_maskz_loadu_ps(which, from);
}

template <bool pairs>
inline void store(void* to, __m512 x, __mmask16 which = 0xffff) {
#ifdef __AVX512BF16__
    if constexpr (pairs) return _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(x));
#endif
    _mm512_mask_storeu_ps(to, which, x);
}

// The lanes of a register that starts `left` numbers before the end.
inline __mmask16 lanes(long left) { return (__mmask16)((1u << std::clamp(left, 0L, LANES)) - 1); }

// ---- attention
//
//     out_i = sum_j e^(q_i k_j scale) v_j / sum_j e^(q_i k_j scale)
// The method is FlashAttention's (Dao et al. 2022, arXiv:2205.14135, algorithm 1): ROWS queries meet COLUMNS keys at a time;
// beside the output so far stand, for each query, the largest score m and the sum l of exp(score - m). A block with a larger
// score scales what is there by exp(m - m_new). Keys and values are laid out in units first:
//     keys    unit (j, t) = numbers 2t, 2t+1 of key j               as [64 keys][t][j]
//     values  unit (t, c) = number c of values 2t and 2t+1          as [t][c], c filled up to a multiple of 16

// Scores of one query against `count` keys (a multiple of LANES) -> their exponentials; m, l and the output so far to match.
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
        store<pairs>((char*)out + j * (pairs ? 2 : 4), p);
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

// Row j of a matrix, of so many units, as column j: [64 rows][unit, filled up to depth][j].
inline void to_column(const char* row, long j, long units, long depth, uint32_t* to) {
    uint32_t* column = to + j / GROUP * depth * GROUP + j % GROUP;
    for (long t = 0; t < units; t++) std::memcpy(column + t * GROUP, row + 4 * t, 4);
}

// Row j, of d numbers, as one of the `step` that make a row of units: [j / step][number].
inline void to_row(const char* row, long j, long d, long step, long width, uint32_t* to) {
    const long size = 4 / step;
    char* at = (char*)(to + j / step * width) + j % step * size;
    for (long c = 0; c < d; c++) std::memcpy(at + 4 * c, row + size * c, size);
}

template <bool pairs, bool amx = false>
struct Attention {
    static constexpr long SIZE = pairs ? 2 : 4, STEP = pairs ? 2 : 1;            // bytes of a number, numbers in a unit
    static constexpr long STRIP = amx ? 2 * LANES : TILE, ROWS = (amx ? 2 : 8) * STRIP;  // queries in a product, in a block

    View q, k, v, out;
    float* kept;                                                                // (B, heads, n) or null: log2 of the sums
    long heads, n, m, d;
    float scale;                                                                // of the exponent in base 2
    long units = d / STEP, depth = up(units, amx ? LANES : 1), width = up(d, LANES), keys = up(m, GROUP);
    std::vector<uint32_t> packed_k{}, packed_v{};                               // of all heads

    char* at(const View& x, long which, long row) const {
        return x.data + (which / heads * x.batch + which % heads * x.head + row * x.row) * SIZE;
    }
    uint32_t* k_of(long which) { return packed_k.data() + which * keys * depth; }
    uint32_t* v_of(long which) { return packed_v.data() + which * keys / STEP * width; }

    void pack(long which) {
        for (long j = 0; j < m; j++) {
            to_column(at(k, which, j), j, units, depth, k_of(which));
            to_row(at(v, which, j), j, d, STEP, width, v_of(which));
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

#ifdef HAS_AMX
        const auto multiply = amx ? product_by_amx : product<pairs>;
        const std::conditional_t<amx, Tiles, int> tiles{};
        (void)tiles;
#else
        const auto multiply = product<pairs>;
#endif
        for (long start = 0; start < m; start += COLUMNS) {
            const long count = std::min(COLUMNS, keys - start), real = std::min(count, m - start);
            for (long j = 0; j < count; j += GROUP)
                multiply(queries.data(), depth, k_of(which) + (start + j) * depth, GROUP, depth, &scores[j], COLUMNS, rows,
                         GROUP, false);
            for (long i = 0; i < up(rows, STRIP); i++) {
                for (long j = real; j < count; j++) scores[i * COLUMNS + j] = -std::numeric_limits<float>::infinity();
                exponentials<pairs>(&scores[i * COLUMNS], &weights[i * COLUMNS / STEP], count, scale, largest[i], sums[i],
                                    &sofar[i * width], width);
            }
            multiply((uint32_t*)weights.data(), COLUMNS / STEP, v_of(which) + start / STEP * width, width, count / STEP,
                     sofar.data(), width, rows, width, true);
        }
        for (long i = 0; i < rows; i++) {
            if (kept) kept[which * n + first + i] = largest[i] * scale + std::log2(sums[i]);
            for (long c = 0; c < d; c += LANES) {
                const __m512 x = _mm512_div_ps(_mm512_loadu_ps(&sofar[i * width + c]), _mm512_set1_ps(sums[i]));
                store<pairs>(at(out, which, first + i) + c * SIZE, x, lanes(d - c));
            }
        }
    }

    void run(long batch, long threads) {
        const long all = batch * heads, blocks = (n + ROWS - 1) / ROWS;
        packed_k.assign(all * keys * depth, 0);
        packed_v.assign(all * keys / STEP * width, 0);
        const bool much = all * n * m * d >= MUCH / 8;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (much)
        for (long i = 0; i < all; i++) pack(i);
        in_threads(all * blocks, much ? threads : 1, [&](long i) { block(i / blocks, i % blocks * ROWS); });
    }
};

// The gradients of attention in bfloat16 (Dao 2023, arXiv:2307.08691, algorithm 2), one head after the other in a thread. With
// S = Q K^T, P = 2^(S scale - kept), and D the sum over a query's numbers of dout * out:
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - D),  dK = dS^T Q factor,  dQ = dS K factor
// Scores are made transposed, a key a row and a query a lane. So P^T and dS^T stand on the left of dV and dK as they come, and
// two rows of dS^T side by side on the right of dQ^T = K^T dS^T.
struct AttentionBack {
    static constexpr long KEYS = 16 * TILE, QUERIES = 4 * GROUP;                // in a block

    View q, k, v, out, dout, dq, dk, dv;
    const float* kept;
    long heads, n, m, d;
    float scale, factor;                                                        // of the exponent in base 2, and in base e
    long depth = d / 2, width = up(d, LANES), high = up(d, TILE), queries = up(n, GROUP), keys = up(m, KEYS);

    char* at(const View& x, long which, long row) const {
        return x.data + (which / heads * x.batch + which % heads * x.head + row * x.row) * 2;
    }

    // P^T and dS^T of TILE keys from `row` on and GROUP queries, from their scores and dP^T; of keys that are none, zero.
    void weigh(const float* scores, const float* dp, long row, const float* shift, const float* delta, uint16_t* p, uint16_t* ds,
               uint32_t* ds_pairs) const {
        const __m512 by = _mm512_set1_ps(scale);
        for (long j = 0; j < GROUP; j += LANES)
            for (long i = 0; i < TILE; i++) {
                const __mmask16 real = row + i < m ? 0xffff : 0;
                const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i * GROUP + j), by, _mm512_loadu_ps(shift + j));
                const __m512 weight = _mm512_maskz_mov_ps(real, exp2(x));
                const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(dp + i * GROUP + j), _mm512_loadu_ps(delta + j));
                store<true>(p + i * QUERIES + j, weight);
                store<true>(ds + i * QUERIES + j, _mm512_mul_ps(weight, slope));
                if (i % 2 == 0) continue;
                const auto half = [&](long k) { return _mm512_cvtepu16_epi32(_mm256_loadu_epi16(ds + k * QUERIES + j)); };
                _mm512_storeu_si512(ds_pairs + i / 2 * QUERIES + j,
                                    _mm512_or_si512(half(i - 1), _mm512_slli_epi32(half(i), 16)));
            }
    }

    void save(const View& to, long which, long first, long count, const float* sums, float by) const {
        for (long i = 0; i < count; i++)
            for (long c = 0; c < d; c += LANES)
                store<true>(at(to, which, first + i) + 2 * c,
                            _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + c), _mm512_set1_ps(by)), lanes(d - c));
    }

    void head(long which) const {
        std::vector<uint32_t> q_columns(queries * depth), do_columns(queries * depth), q_rows(queries / 2 * width),
            do_rows(queries / 2 * width), k_units(keys * depth), v_units(keys * depth), k_turned(high * keys / 2),
            p(KEYS * QUERIES / 2), ds(KEYS * QUERIES / 2), ds_pairs(KEYS * QUERIES / 2);
        std::vector<float> shift(queries, 1e4f), delta(queries), dq_turned(high * queries), dk_sums(KEYS * width),
            dv_sums(KEYS * width);                                               // 2^-10000: a query that is none has no weight
        for (long i = 0; i < n; i++) {
            const char *query = at(q, which, i), *up = at(dout, which, i), *y = at(out, which, i);
            to_column(query, i, depth, depth, q_columns.data()), to_column(up, i, depth, depth, do_columns.data());
            to_row(query, i, d, 2, width, q_rows.data()), to_row(up, i, d, 2, width, do_rows.data());
            __m512 sum = _mm512_setzero_ps();
            for (long c = 0; c < d; c += LANES)
                sum = _mm512_fmadd_ps(load<true>(up + 2 * c, lanes(d - c)), load<true>(y + 2 * c, lanes(d - c)), sum);
            delta[i] = _mm512_reduce_add_ps(sum), shift[i] = kept[which * n + i];
        }
        for (long j = 0; j < m; j++) {
            std::memcpy(&k_units[j * depth], at(k, which, j), 2 * d);
            std::memcpy(&v_units[j * depth], at(v, which, j), 2 * d);
            for (long c = 0; c < d; c++) ((uint16_t*)k_turned.data())[c * keys + j] = ((uint16_t*)&k_units[j * depth])[c];
        }
        for (long first = 0; first < m; first += KEYS) {
            const long rows = std::min(KEYS, up(m - first, TILE));
            std::fill(dk_sums.begin(), dk_sums.end(), 0), std::fill(dv_sums.begin(), dv_sums.end(), 0);
            for (long start = 0; start < queries; start += QUERIES) {
                const long count = std::min(QUERIES, queries - start);
                for (long i = 0; i < rows; i += TILE)
                    for (long j = 0; j < count; j += GROUP) {
                        float scores[TILE * GROUP], dp[TILE * GROUP];
                        tile<true, 4, TILE>(&k_units[(first + i) * depth], depth, &q_columns[(start + j) * depth], GROUP, depth,
                                            scores, GROUP, false);
                        tile<true, 4, TILE>(&v_units[(first + i) * depth], depth, &do_columns[(start + j) * depth], GROUP,
                                            depth, dp, GROUP, false);
                        weigh(scores, dp, first + i, &shift[start + j], &delta[start + j],
                              (uint16_t*)p.data() + i * QUERIES + j, (uint16_t*)ds.data() + i * QUERIES + j,
                              &ds_pairs[i / 2 * QUERIES + j]);
                    }
                for (long c = 0; c < width; c += GROUP)
                    for (long i = 0; i < rows; i += TILE) {
                        const auto add = tile_for<true, TILE>((width - c) / LANES);
                        const long from = start / 2 * width + c, to = i * width + c, row = i * QUERIES / 2;
                        add(&p[row], QUERIES / 2, &do_rows[from], width, count / 2, &dv_sums[to], width, true);
                        add(&ds[row], QUERIES / 2, &q_rows[from], width, count / 2, &dk_sums[to], width, true);
                    }
                for (long j = 0; j < count; j += GROUP)
                    for (long c = 0; c < high; c += TILE)
                        tile<true, 4, TILE>(&k_turned[(c * keys + first) / 2], keys / 2, &ds_pairs[j], QUERIES, rows / 2,
                                            &dq_turned[c * queries + start + j], queries, true);
            }
            save(dk, which, first, std::min(KEYS, m - first), dk_sums.data(), factor);
            save(dv, which, first, std::min(KEYS, m - first), dv_sums.data(), 1);
        }
        std::vector<float> row(width);
        for (long i = 0; i < n; i++) {
            for (long c = 0; c < d; c++) row[c] = dq_turned[c * queries + i];
            save(dq, which, i, 1, row.data(), factor);
        }
    }

    void run(long batch, long threads) const {
        const bool much = batch * heads * n * m * d >= MUCH / 8;
        in_threads(batch * heads, much ? threads : 1, [&](long i) { head(i); });
    }
};

// ---- linear
//
//     y = x W^T + b, then after it: nothing, y Phi(y) (GELU), or y * other
// A tile is up to TILE rows of x by GROUP columns of y; its sums stay in registers over all of k.

enum After { NOTHING, GELU, TIMES };        // what happens to the output: GELU(y), y * other

// Rows of x (m, k) -> y (m, n). w: [k units][n filled up to a multiple of 16].
template <bool pairs>
struct Linear {
    const char *x, *bias, *other;
    const uint32_t* w;
    char* y;
    long m, k, n;
    After after;

    template <int rows>
    void some(long row, long column) const {
        constexpr long SIZE = pairs ? 2 : 4;
        const long depth = k * SIZE / 4, width = up(n, LANES), end = std::min(column + GROUP, width);
        float sums[rows * GROUP];
        tile_for<pairs, rows>((end - column) / LANES)((const uint32_t*)(x + row * k * SIZE), depth, w + column, width, depth,
                                                      sums, GROUP, false);
        for (long i = 0; i < rows; i++)
            for (long c = column; c < end; c += LANES) {
                const __mmask16 which = lanes(n - c);
                const long at = ((row + i) * n + c) * SIZE;
                __m512 sum = _mm512_loadu_ps(sums + i * GROUP + c - column);
                if (bias) sum = _mm512_add_ps(sum, load<pairs>(bias + c * SIZE, which));
                if (after == GELU) sum = gelu(sum);
                if (after == TIMES) sum = _mm512_mul_ps(sum, load<pairs>(other + at, which));
                store<pairs>(y + at, sum, which);
            }
    }

    void run(long threads) const {
        const long columns = (n + GROUP - 1) / GROUP, rows = (m + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (m * k * n >= MUCH)
        for (long i = 0; i < columns * rows; i++) {
            const long column = i / rows * GROUP, row = i % rows * TILE;
            if (row + TILE <= m)
                some<TILE>(row, column);
            else
                for (long last = row; last < m; last++) some<1>(last, column);
        }
    }
};

// ---- LayerNorm
//
//     mean = sum x / k,  variance = sum (x - mean)^2 / k,  y = (x - mean) / sqrt(variance + eps) * weight + bias
// in three passes over a row that is in the cache.

// Rows of x (rows, k) -> (x - mean) / deviation * weight + bias; weight and bias (k) are float32.
template <bool pairs>
struct LayerNorm {
    static constexpr long SIZE = pairs ? 2 : 4;
    const char* x;
    const float *weight, *bias;
    char* out;
    long rows, k;
    float eps;

    void row(long i) const {
        const char* from = x + i * k * SIZE;
        __m512 sum = _mm512_setzero_ps(), square = sum;
        for (long c = 0; c < k; c += LANES) sum = _mm512_add_ps(sum, load<pairs>(from + c * SIZE, lanes(k - c)));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / k);
        for (long c = 0; c < k; c += LANES) {
            const __m512 d = _mm512_maskz_sub_ps(lanes(k - c), load<pairs>(from + c * SIZE, lanes(k - c)), mean);
            square = _mm512_fmadd_ps(d, d, square);
        }
        const __m512 by = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(square) / k + eps));
        for (long c = 0; c < k; c += LANES) {
            const __mmask16 which = lanes(k - c);
            const __m512 d = _mm512_mul_ps(_mm512_sub_ps(load<pairs>(from + c * SIZE, which), mean), by);
            store<pairs>(out + (i * k + c) * SIZE,
                         _mm512_fmadd_ps(d, load<false>(weight + c, which), load<false>(bias + c, which)), which);
        }
    }

    void run(long threads) const {
#pragma omp parallel for num_threads(threads) if (rows * k >= (1 << 16))
        for (long i = 0; i < rows; i++) row(i);
    }
};

// ---- GroupNorm and SiLU
//
//     h = x + shift,  z = (h - mean) / sqrt(variance + eps) * weight + bias,  y = z / (1 + e^-z)
// with mean and variance over a group's channels and all positions. As z = scale x + offset, channel by channel, the second
// pass is one multiplication and addition before the SiLU.

// Maps (batch, positions, channels) -> the same, silu((x + shift - mean) / deviation * weight + bias). weight, bias (channels)
// are float32; shift (batch, channels) or null; kept (2, batch, channels), or null, takes means and 1 / deviations. Sums and
// squares are of differences from the first position, channel by channel, in float32 over CHUNK positions and in float64 over
// those, always in the same order.
template <bool pairs>
struct NormSilu {
    static constexpr long SIZE = pairs ? 2 : 4, CHUNK = 256;
    const char* x;
    const float *weight, *bias;
    const char* shift;
    char* out;
    float* kept;
    long batch, positions, channels, groups;
    double eps;
    bool silu;

    const char* at(long b, long position) const { return x + (b * positions + position) * channels * SIZE; }

    // Adds up one chunk: sums and squares (channels).
    void add(long b, long first, float* sums, float* squares) const {
        for (long c = 0; c < channels; c += GROUP) {
            __m512 origin[4], sum[4], square[4];
            for (long j = 0; j < 4; j++) {
                origin[j] = load<pairs>(at(b, 0) + (c + j * LANES) * SIZE, lanes(channels - c - j * LANES));
                sum[j] = square[j] = _mm512_setzero_ps();
            }
            for (long i = first; i < std::min(first + CHUNK, positions); i++)
                for (long j = 0; j < 4; j++) {
                    const __m512 x = load<pairs>(at(b, i) + (c + j * LANES) * SIZE, lanes(channels - c - j * LANES));
                    const __m512 d = _mm512_sub_ps(x, origin[j]);
                    sum[j] = _mm512_add_ps(sum[j], d);
                    square[j] = _mm512_fmadd_ps(d, d, square[j]);
                }
            for (long j = 0; j < 4; j++) {
                _mm512_mask_storeu_ps(sums + c + j * LANES, lanes(channels - c - j * LANES), sum[j]);
                _mm512_mask_storeu_ps(squares + c + j * LANES, lanes(channels - c - j * LANES), square[j]);
            }
        }
    }

    static float one(const char* of, long c) {
        float number[LANES];
        _mm512_storeu_ps(number, load<pairs>(of + c * SIZE, 1));
        return number[0];
    }

    // From the chunks' sums and squares to what a number is multiplied by and what is added: scale and offset (channels).
    void settle(long b, const float* sums, const float* squares, long chunks, float* scale, float* offset) const {
        const long wide = channels / groups;
        for (long group = 0; group < groups; group++) {
            double mean = 0, variance = 0;
            std::vector<double> means(wide), spreads(wide);
            for (long j = 0; j < wide; j++) {
                const long c = group * wide + j;
                double sum = 0, square = 0;
                for (long i = 0; i < chunks; i++) sum += sums[i * channels + c], square += squares[i * channels + c];
                sum /= positions;
                means[j] = one(at(b, 0), c) + sum + (shift ? one(shift + b * channels * SIZE, c) : 0.0f);
                spreads[j] = square / positions - sum * sum;
                mean += means[j] / wide;
            }
            for (long j = 0; j < wide; j++) variance += (spreads[j] + (means[j] - mean) * (means[j] - mean)) / wide;
            for (long j = 0; j < wide; j++) {
                const long c = group * wide + j;
                const double by = weight[c] / std::sqrt(variance + eps);
                scale[c] = by;
                offset[c] = bias[c] + by * ((shift ? one(shift + b * channels * SIZE, c) : 0.0f) - mean);
                if (kept) kept[b * channels + c] = mean, kept[(batch + b) * channels + c] = 1 / std::sqrt(variance + eps);
            }
        }
    }

    void finish(long b, long first, const float* scale, const float* offset) const {
        const __m512 one = _mm512_set1_ps(1.0f), log2e = _mm512_set1_ps(-1.44269504f);
        for (long i = first; i < std::min(first + CHUNK, positions); i++)
            for (long c = 0; c < channels; c += LANES) {
                const __mmask16 which = lanes(channels - c);
                const __m512 y = _mm512_fmadd_ps(load<pairs>(at(b, i) + c * SIZE, which), load<false>(scale + c, which),
                                                 load<false>(offset + c, which));
                const __m512 below = silu ? _mm512_add_ps(one, exp2(_mm512_mul_ps(y, log2e))) : one;   // y / (1 + e^-y)
                store<pairs>(out + (at(b, i) - x) + c * SIZE, _mm512_div_ps(y, below), which);
            }
    }

    void run(long threads) const {
        const long chunks = (positions + CHUNK - 1) / CHUNK, all = batch * chunks;
        const bool much = batch * positions * channels >= (1 << 15);
        std::vector<float> sums(all * channels), squares(all * channels), scale(batch * channels), offset(batch * channels);
#pragma omp parallel for num_threads(threads) if (much)
        for (long i = 0; i < all; i++) add(i / chunks, i % chunks * CHUNK, &sums[i * channels], &squares[i * channels]);
        for (long b = 0; b < batch; b++)
            settle(b, &sums[b * chunks * channels], &squares[b * chunks * channels], chunks, &scale[b * channels],
                   &offset[b * channels]);
#pragma omp parallel for num_threads(threads) if (much)
        for (long i = 0; i < all; i++)
            finish(i / chunks, i % chunks * CHUNK, &scale[i / chunks * channels], &offset[i / chunks * channels]);
    }
};

// Its gradients, without a shift: from dy to dx (maps), dweight and dbias (channels, float32).
//     x^ = (x - mean) / deviation,  z = x^ weight + bias,  s = 1 / (1 + e^-z),  dz = dy s (1 + z (1 - s))
//     dweight = sum dz x^,  dbias = sum dz,  dx = (weight dz - mean of weight dz - x^ mean of weight dz x^) / deviation
// with means over a picture's group.
template <bool pairs>
struct NormSiluBack {
    static constexpr long SIZE = pairs ? 2 : 4, CHUNK = 256;
    const char *x, *dy;
    const float *weight, *bias, *kept;
    char* dx;
    float *dweight, *dbias;
    long batch, positions, channels, groups;
    bool silu;

    // x^ and dz of 16 channels of a picture at a position.
    void at(long b, long i, long c, __mmask16 which, __m512& normal, __m512& dz) const {
        const long where = ((b * positions + i) * channels + c) * SIZE;
        const __m512 one = _mm512_set1_ps(1.0f), mean = load<false>(kept + b * channels + c, which);
        normal = _mm512_mul_ps(_mm512_sub_ps(load<pairs>(x + where, which), mean),
                               load<false>(kept + (batch + b) * channels + c, which));
        dz = load<pairs>(dy + where, which);
        if (!silu) return;
        const __m512 z = _mm512_fmadd_ps(normal, load<false>(weight + c, which), load<false>(bias + c, which));
        const __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, exp2(_mm512_mul_ps(z, _mm512_set1_ps(-1.44269504f)))));
        const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(z, _mm512_sub_ps(one, s), one));
        dz = _mm512_mul_ps(dz, slope);
    }

    void add(long b, long first, float* sums, float* products) const {
        for (long c = 0; c < channels; c += LANES) {
            const __mmask16 which = lanes(channels - c);
            __m512 sum = _mm512_setzero_ps(), product = sum, normal, dz;
            for (long i = first; i < std::min(first + CHUNK, positions); i++) {
                at(b, i, c, which, normal, dz);
                sum = _mm512_add_ps(sum, dz);
                product = _mm512_fmadd_ps(dz, normal, product);
            }
            _mm512_mask_storeu_ps(sums + c, which, sum);
            _mm512_mask_storeu_ps(products + c, which, product);
        }
    }

    void finish(long b, long first, const float* mean, const float* slope) const {
        for (long i = first; i < std::min(first + CHUNK, positions); i++)
            for (long c = 0; c < channels; c += LANES) {
                const __mmask16 which = lanes(channels - c);
                __m512 normal, dz;
                at(b, i, c, which, normal, dz);
                const __m512 rest = _mm512_fmadd_ps(normal, load<false>(slope + c, which), load<false>(mean + c, which));
                const __m512 d = _mm512_fmsub_ps(load<false>(weight + c, which), dz, rest);
                store<pairs>(dx + ((b * positions + i) * channels + c) * SIZE,
                             _mm512_mul_ps(d, load<false>(kept + (batch + b) * channels + c, which)), which);
            }
    }

    void run(long threads) const {
        const long chunks = (positions + CHUNK - 1) / CHUNK, all = batch * chunks, wide = channels / groups;
        std::vector<float> sums(all * channels), products(all * channels), mean(batch * channels), slope(batch * channels);
        std::vector<double> dw(channels), db(channels);
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < all; i++) add(i / chunks, i % chunks * CHUNK, &sums[i * channels], &products[i * channels]);
        for (long b = 0; b < batch; b++)
            for (long group = 0; group < groups; group++) {
                double means = 0, slopes = 0;
                for (long c = group * wide; c < (group + 1) * wide; c++) {
                    double sum = 0, product = 0;
                    for (long i = b * chunks; i < (b + 1) * chunks; i++)
                        sum += sums[i * channels + c], product += products[i * channels + c];
                    db[c] += sum, dw[c] += product;
                    means += weight[c] * sum, slopes += weight[c] * product;
                }
                for (long c = group * wide; c < (group + 1) * wide; c++)
                    mean[b * channels + c] = means / (wide * positions), slope[b * channels + c] = slopes / (wide * positions);
            }
        for (long c = 0; c < channels; c++) dweight[c] = dw[c], dbias[c] = db[c];
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < all; i++)
            finish(i / chunks, i % chunks * CHUNK, &mean[i / chunks * channels], &slope[i / chunks * channels]);
    }
};

// ---- GEGLU
//
//     y = value * gate Phi(gate);  dvalue = dy gate Phi(gate),  dgate = dy value (Phi(gate) + gate phi(gate))
// with Phi and phi the normal distribution and its density.

// x (rows, 2 d), values and gates side by side -> value * GELU(gate) (rows, d); given dy (rows, d), the gradient (rows, 2 d).
template <bool pairs>
struct Geglu {
    static constexpr long SIZE = pairs ? 2 : 4;
    const char *x, *dy;
    char* out;
    long rows, d;

    void row(long i) const {
        const char *values = x + 2 * i * d * SIZE, *gates = values + d * SIZE;
        for (long c = 0; c < d; c += LANES) {
            const __mmask16 which = lanes(d - c);
            const __m512 value = load<pairs>(values + c * SIZE, which), gate = load<pairs>(gates + c * SIZE, which);
            __m512 density;
            const __m512 share = normal(gate, density), active = _mm512_mul_ps(gate, share);
            if (!dy) {
                store<pairs>(out + (i * d + c) * SIZE, _mm512_mul_ps(value, active), which);
                continue;
            }
            const __m512 up = load<pairs>(dy + (i * d + c) * SIZE, which);
            const __m512 slope = _mm512_fmadd_ps(gate, density, share);              // of x Phi(x): Phi(x) + x phi(x)
            store<pairs>(out + (2 * i * d + c) * SIZE, _mm512_mul_ps(up, active), which);
            store<pairs>(out + ((2 * i + 1) * d + c) * SIZE, _mm512_mul_ps(_mm512_mul_ps(up, value), slope), which);
        }
    }

    void run(long threads) const {
#pragma omp parallel for num_threads(threads)
        for (long i = 0; i < rows; i++) row(i);
    }
};

}  // namespace

// ---- called from Python. bits: 32 (float32) or 16 (bfloat16). Those that return a status need memory: see `status_of`.

// 1 if the compiler knew the processor's bfloat16 instructions; without them, nothing here is for 16 bits.
extern "C" int knows_bfloat16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// Likewise AMX's; `attend` by AMX is for processors that have it, after the process asked the system for its registers.
extern "C" int knows_amx() {
#ifdef HAS_AMX
    return 1;
#else
    return 0;
#endif
}

// strides: batch, head and row of q, k, v and out. kept (batch, heads, n) or null takes what attend_back needs.
extern "C" int attend(int bits, [[maybe_unused]] int amx, char* q, char* k, char* v, char* out, float* kept,
                      const long* strides, long batch, long heads, long n, long m, long d, double scale, long threads) {
    const auto view = [&](char* data, int i) { return View{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    const auto run = [&](auto work) { return status_of([&] { work.run(batch, threads); }); };
    const float in_base_2 = (float)(scale * 1.4426950408889634);
    if (bits == 32)
        return run(Attention<false>{view(q, 0), view(k, 1), view(v, 2), view(out, 3), kept, heads, n, m, d, in_base_2});
#ifdef HAS_AMX
    if (amx)
        return run(Attention<true, true>{view(q, 0), view(k, 1), view(v, 2), view(out, 3), kept, heads, n, m, d, in_base_2});
#endif
    return run(Attention<true>{view(q, 0), view(k, 1), view(v, 2), view(out, 3), kept, heads, n, m, d, in_base_2});
}

// bfloat16 only. data and strides: of q, k, v, out, dout, dq, dk and dv.
extern "C" int attend_back(char* const* data, const long* strides, const float* kept, long batch, long heads, long n, long m,
                           long d, double scale, long threads) {
    const auto view = [&](int i) { return View{data[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    const AttentionBack work{view(0), view(1), view(2), view(3), view(4), view(5), view(6), view(7), kept, heads, n, m, d,
                             (float)(scale * 1.4426950408889634), (float)scale};
    return status_of([&] { work.run(batch, threads); });
}

// w (n, k) -> packed [k units][n filled up to a multiple of 16], which is zero before.
extern "C" void pack(int bits, const char* w, uint32_t* packed, long k, long n) {
    const long depth = k * bits / 32, width = up(n, LANES);
    for (long j = 0; j < n; j++)
        for (long t = 0; t < depth; t++) std::memcpy(packed + t * width + j, w + 4 * (j * depth + t), 4);
}

extern "C" void linear(int bits, const char* x, const uint32_t* w, const char* bias, const char* other, char* y, long m, long k,
                       long n, int after, long threads) {
    if (bits == 32)
        Linear<false>{x, bias, other, w, y, m, k, n, (After)after}.run(threads);
    else
        Linear<true>{x, bias, other, w, y, m, k, n, (After)after}.run(threads);
}

extern "C" void layer_norm(int bits, const char* x, const float* weight, const float* bias, char* out, long rows, long k,
                           double eps, long threads) {
    if (bits == 32)
        LayerNorm<false>{x, weight, bias, out, rows, k, (float)eps}.run(threads);
    else
        LayerNorm<true>{x, weight, bias, out, rows, k, (float)eps}.run(threads);
}

extern "C" int norm_silu(int bits, const char* x, const float* weight, const float* bias, const char* shift, char* out,
                         float* kept, long batch, long positions, long channels, long groups, double eps, int silu,
                         long threads) {
    const auto run = [&](auto work) { return status_of([&] { work.run(threads); }); };
    if (bits == 32)
        return run(NormSilu<false>{x, weight, bias, shift, out, kept, batch, positions, channels, groups, eps, silu != 0});
    return run(NormSilu<true>{x, weight, bias, shift, out, kept, batch, positions, channels, groups, eps, silu != 0});
}

extern "C" int norm_silu_back(int bits, const char* x, const char* dy, const float* weight, const float* bias,
                              const float* kept, char* dx, float* dweight, float* dbias, long batch, long positions,
                              long channels, long groups, int silu, long threads) {
    const auto run = [&](auto work) { return status_of([&] { work.run(threads); }); };
    if (bits == 32)
        return run(NormSiluBack<false>{x, dy, weight, bias, kept, dx, dweight, dbias, batch, positions, channels, groups,
                                       silu != 0});
    return run(NormSiluBack<true>{x, dy, weight, bias, kept, dx, dweight, dbias, batch, positions, channels, groups,
                                  silu != 0});
}

// dy null: forward, out (rows, d). Otherwise backward, out (rows, 2 d).
extern "C" void geglu(int bits, const char* x, const char* dy, char* out, long rows, long d, long threads) {
    if (bits == 32)
        Geglu<false>{x, dy, out, rows, d}.run(threads);
    else
        Geglu<true>{x, dy, out, rows, d}.run(threads);
}
