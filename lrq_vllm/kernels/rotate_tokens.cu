// Tokens, rotated by a Hadamard matrix H_B = (P (x) S) / sqrt(B): P Paley's, S Sylvester's.
//
// Twin: rotate of checkpoint/hadamard.py, rounded to x's type. A block of threads takes B inputs of a token. The product with P is
// taken on tensor cores, of 16-bit inputs with float32 sums. A lane gets 16 neighbouring columns of it, and takes the product with
// S for their 4 bits at once: butterflies in float32. Those of the other bits follow, up to five at a time, through shared memory.
//
// Constants: FLOAT16, ORDER (of P; 1 for none), LOG_SIZE (of S, 4 at least), ROWS (ORDER, filled up to what tensor cores take),
// Y_STRIDE (of sums in shared memory, from row to row), THREADS, SCALE (1 / sqrt(B)). hopper.cuh comes before.

#define SIZE (1 << LOG_SIZE)
#define WARPS (THREADS / 32)
#define OWN_BITS 4  // of a lane's columns
#define OWN (1 << OWN_BITS)
#define LEFT (LOG_SIZE - OWN_BITS)  // bits
#define PASSES ((LEFT + 4) / 5)
#define TILES (ROWS / 16)
#define GROUPS ((SIZE + 63) / 64)  // of columns

// 16 bytes more for every 16 columns: what 8 lanes write, or 32 lanes read, meets in no bank.
__device__ __forceinline__ int place(int row, int column) { return row * Y_STRIDE + column + column / OWN * 4; }

template <int COUNT> __device__ __forceinline__ void add_and_subtract(float (&values)[COUNT]) {
#pragma unroll
    for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!(i & half)) {
                const float a = values[i], b = values[i + half];
                values[i] = a + b;
                values[i + half] = a - b;
            }
}

// 16 neighbouring columns of a row, to where the next butterflies find them, or out.
__device__ __forceinline__ void put(const float (&values)[OWN], int row, int column, float* y, unsigned short* to) {
    if constexpr (LEFT > 0) {
#pragma unroll
        for (int i = 0; i < OWN; i += 4)
            *(float4*)(y + place(row, column) + i) = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    } else {
#pragma unroll
        for (int i = 0; i < OWN; i += 8) {
            Words words;
#pragma unroll
            for (int j = 0; j < 4; j++) words.at[j] = half_pair(values[i + 2 * j] * SCALE, values[i + 2 * j + 1] * SCALE);
            *(Words*)(to + row * SIZE + column + i) = words;
        }
    }
}

#if ORDER > 1
// P x. A warp takes 64 columns; of a tile of 8 columns, the instruction's column n is column 8 n + tile of them.
__device__ __forceinline__ void multiply_by_paley(const u8* __restrict__ paley, const u8* __restrict__ x, float* y, unsigned short* to) {
    constexpr int UNROLLED = TILES <= 2 ? TILES : 1;
    const int lane = threadIdx.x % 32, row = lane / 4, unit = lane % 4;
    for (int task = threadIdx.x / 32; task < TILES * GROUPS; task += WARPS) {
        const int first = task % TILES * 16, column = task / TILES * 64;
        float sums[8][4] = {};
#pragma unroll UNROLLED
        for (int k = 0; k < ROWS; k += 16) {
            Words inputs[4];
            u32 signs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int from = k + 2 * unit + i % 2 + i / 2 * 8;
                inputs[i] = load_words(x + 2 * (from * SIZE + column + 8 * row), from < ORDER && column + 8 * row < SIZE);
                signs[i] = *(const u32*)(paley + 2 * ((first + row + i % 2 * 8) * ROWS + k + 2 * unit + i / 2 * 8));
            }
#pragma unroll
            for (int tile = 0; tile < 8; tile++) {
                const int order = tile % 2 ? 0x7632 : 0x5410;
                const u32 pairs[2] = {__byte_perm(inputs[0].at[tile / 2], inputs[1].at[tile / 2], order),
                                      __byte_perm(inputs[2].at[tile / 2], inputs[3].at[tile / 2], order)};
                multiply_floats(sums[tile], signs, pairs);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float values[OWN];
#pragma unroll
            for (int i = 0; i < OWN; i++) values[i] = sums[i % 8][2 * half + i / 8];
            add_and_subtract(values);
            const int here = first + row + 8 * half, own = column + OWN * unit;
            if (here < ORDER && own < SIZE) put(values, here, own, y, to);
        }
    }
}
#endif

// Bits FIRST to FIRST + BITS of the column; the last ones are scaled and leave.
template <int PASS> __device__ __forceinline__ void butterflies(float* y, unsigned short* to) {
    constexpr int EACH = LEFT / PASSES, SHORT = PASSES - LEFT % PASSES;  // so many passes of EACH bits come first
    constexpr int FIRST = OWN_BITS + PASS * EACH + (PASS > SHORT ? PASS - SHORT : 0), BITS = EACH + (PASS >= SHORT);
    constexpr int ABOVE = LOG_SIZE - FIRST - BITS, COUNT = 1 << BITS;
    constexpr bool LAST = PASS == PASSES - 1;
    __syncthreads();
    for (int group = threadIdx.x; group < ORDER * (SIZE / COUNT); group += THREADS) {
        const int low = group % (1 << FIRST), high = (group >> FIRST) % (1 << ABOVE), row = group >> (FIRST + ABOVE);
        const int column = (high << (FIRST + BITS)) + low;
        float values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] = y[place(row, column + (i << FIRST))];
        add_and_subtract(values);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if constexpr (LAST) to[row * SIZE + column + (i << FIRST)] = half_bits(values[i] * SCALE);
            else y[place(row, column + (i << FIRST))] = values[i];
        }
    }
    if constexpr (!LAST) butterflies<PASS + 1>(y, to);
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate_tokens(
    const u8* x, const u8* paley, unsigned short* rotated, int inputs, int x_row_bytes) {
    extern __shared__ __align__(16) float y[];
    const int blocks = inputs / (ORDER * SIZE);
    const u64 token = blockIdx.x / blocks;
    const int first = blockIdx.x % blocks * (ORDER * SIZE);
    const u8* const from = x + token * x_row_bytes + 2 * first;
    unsigned short* const to = rotated + token * inputs + first;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if ORDER > 1
    multiply_by_paley(paley, from, y, to);
#else
    for (int column = OWN * threadIdx.x; column < SIZE; column += OWN * THREADS) {
        float values[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i += 8) {
            const Words words = load_words(from + 2 * (column + i), true);
#pragma unroll
            for (int j = 0; j < 8; j++) values[i + j] = j % 2 ? high_half(words.at[j / 2]) : low_half(words.at[j / 2]);
        }
        add_and_subtract(values);
        put(values, 0, column, y, to);
    }
#endif
    if constexpr (LEFT > 0) butterflies<0>(y, to);
}
