// AMX's instructions as plain loops, after their descriptions in Intel's Software Developer's Manual, volume 2: for tests on
// processors without them. Included before kernels.cpp, which then takes the processor for one that has them.
// A thread's registers are gone when it releases them, and using them without a configuration ends the process.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef __AMX_TILE__
#undef __AMX_BF16__
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace emulated {

struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Register {
    alignas(64) unsigned char row[16][64];
};

inline thread_local Config config{};
inline thread_local Register registers[8];

inline void must(bool holds, const char* what) {
    if (!holds) std::fprintf(stderr, "emulated AMX: %s\n", what), std::abort();
}

inline void load_config(const void* from) {
    std::memcpy(&config, from, sizeof config);
    must(config.palette == 1 && config.start_row == 0, "palette 1 from row 0 on is what there is");
    for (const uint8_t byte : config.reserved) must(byte == 0, "a reserved byte is not zero");
    for (int i = 0; i < 16; i++) {
        must(i < 8 ? config.bytes[i] <= 64 : config.bytes[i] == 0, "a row is at most 64 bytes, of 8 registers");
        must(i < 8 ? config.rows[i] <= 16 : config.rows[i] == 0, "there are at most 16 rows, of 8 registers");
        must((config.bytes[i] == 0) == (config.rows[i] == 0), "a register has rows and bytes, or neither");
    }
    std::memset(registers, 0, sizeof registers);
}

inline void release() { config = Config{}; }

inline void used(int tile) { must(config.palette == 1 && config.rows[tile], "a register is used that is not configured"); }

inline void zero(int tile) { used(tile), std::memset(&registers[tile], 0, sizeof(Register)); }

inline void load(int tile, const void* base, long stride) {
    zero(tile);
    for (int i = 0; i < config.rows[tile]; i++)
        std::memcpy(registers[tile].row[i], (const char*)base + i * stride, config.bytes[tile]);
}

inline void store(int tile, void* base, long stride) {
    used(tile);
    for (int i = 0; i < config.rows[tile]; i++)
        std::memcpy((char*)base + i * stride, registers[tile].row[i], config.bytes[tile]);
}

inline float number(const unsigned char* bfloat16) {
    uint16_t half;
    std::memcpy(&half, bfloat16, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// TDPBF16PS: sums (M, N) float32 += left (M, 2 K) times right (K, N pairs); even and odd products are summed apart.
inline void multiply(int sums, int left, int right) {
    used(sums), used(left), used(right);
    const int rows = config.rows[sums], columns = config.bytes[sums] / 4, depth = config.bytes[left] / 4;
    must(rows == config.rows[left] && depth == config.rows[right] && columns == config.bytes[right] / 4, "shapes do not fit");
    must(sums != left && sums != right && left != right, "a register is used twice");
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            float sum, part[2] = {};
            for (int k = 0; k < depth; k++)
                for (int half = 0; half < 2; half++)
                    part[half] += number(&registers[left].row[m][4 * k + 2 * half]) *
                                  number(&registers[right].row[k][4 * n + 2 * half]);
            std::memcpy(&sum, &registers[sums].row[m][4 * n], 4);
            sum += part[0] + part[1];
            std::memcpy(&registers[sums].row[m][4 * n], &sum, 4);
        }
}

}  // namespace emulated

#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
