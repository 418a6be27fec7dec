/* What this machine can do, and weights in the order of the products. No instruction beyond x86-64's first. */
#include "lowrank_native.h"

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Which functions and structures this library has; native.py expects the same number. One more with every change. */
int lowrank_interface(void) { return 5; }

/* The level of instructions that this library may use here (the plain product uses those of level 1): 2 is AVX512 with VNNI, 1 AVX2, 0 none. */
int lowrank_supported(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return 2;
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

/* Bytes that a packed weight takes; `columns` is a multiple of 4. */
int64_t lowrank_packed_bytes(int64_t outputs, int64_t columns) {
    return round_up(outputs, LANES) / LANES * panel_stride(columns);
}

/* Pack codes (outputs, columns) of any strides. `panels` holds lowrank_packed_bytes, `sums` outputs rounded up to 16. */
void lowrank_pack(const int8_t *codes, int64_t output_stride, int64_t column_stride, int64_t outputs, int64_t columns,
                  int8_t *panels, int32_t *sums) {
    const int64_t filled = round_up(columns, 4), stride = panel_stride(filled), bytes = lowrank_packed_bytes(outputs, filled);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    /* A large weight in pages of 4 KiB misses the TLB all the time. Only a hint. */
    const int64_t huge = 1 << 21, first = round_up((int64_t)(intptr_t)panels, huge) - (int64_t)(intptr_t)panels;
    if (bytes - first >= huge) (void)madvise(panels + first, (size_t)((bytes - first) / huge * huge), MADV_HUGEPAGE);
#endif
    memset(panels, 0, (size_t)bytes);
    memset(sums, 0, sizeof(int32_t) * (size_t)round_up(outputs, LANES));
    for (int64_t output = 0; output < outputs; output++) {
        int8_t *to = panels + output / LANES * stride + output % LANES * 4;
        const int8_t *from = codes + output * output_stride;
        int32_t sum = 0;
        for (int64_t column = 0; column < columns; column++) {
            const int8_t code = from[column * column_stride];
            to[column / 4 * (4 * LANES) + column % 4] = code;
            sum += code;
        }
        sums[output] = sum;
    }
}
