// Tokens, rotated by a Hadamard matrix H_B = (P (x) S) / sqrt(B): P Paley's, S Sylvester's.
//
// Twin: rotate of checkpoint/hadamard.py, rounded to x's type. A block of threads takes B inputs of a token. The product with P is
// taken on tensor cores, of 16-bit inputs with float32 sums; that with S is log2 of its size butterflies in float32, up to five at
// a time in registers.
//
// Constants: FLOAT16, ORDER (of P; 1 for none), LOG_SIZE (of S), ROWS (ORDER, filled up to what tensor cores take), X_STRIDE and
// Y_STRIDE (from row to row in shared memory, of inputs and of sums), THREADS, SCALE (1 / sqrt(B)). hopper.cuh comes before.

#define SIZE (1 << LOG_SIZE)
#define WARPS (THREADS / 32)
#define PASSES ((LOG_SIZE + 4) / 5)
#define UNITS (ORDER * SIZE / 8)  // of 8 inputs

// Columns stand so that threads which read 8, 16 or 32 columns each, one by one, meet in no bank.
__device__ __forceinline__ int place(int row, int column) { return row * Y_STRIDE + column + column / 32; }

#if ORDER > 1
// P x: its columns are those of S, of which each warp takes 8 at a time.
__device__ __forceinline__ void multiply_by_paley(const u8* paley, const u8* x, float* y) {
    const int lane = threadIdx.x % 32, row = lane / 4, pair = 2 * (lane % 4);
    for (int rows = 0; rows < ORDER; rows += 16) {
        u32 signs[ROWS / 16][4];
#pragma unroll
        for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
            for (int part = 0; part < 4; part++)
                signs[k][part] = *(const u32*)(paley + 2 * ((rows + row + part % 2 * 8) * ROWS + 16 * k + pair + part / 2 * 8));
        for (int columns = threadIdx.x / 32 * 8; columns < SIZE; columns += 8 * WARPS) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++) {
                u32 inputs[2];
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                             : "=r"(inputs[0]), "=r"(inputs[1])
                             : "r"(address(x + 2 * ((16 * k + lane % 16) * X_STRIDE + columns))) : "memory");
                multiply_floats(sums, signs[k], inputs);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int to = rows + row + i / 2 * 8;
                if (to < ORDER) y[place(to, columns + pair + i % 2)] = sums[i];
            }
        }
    }
}
#endif

// Bits FIRST to FIRST + BITS of the column; the last ones are scaled and leave.
template <int PASS> __device__ __forceinline__ void butterflies(float* y, unsigned short* to) {
    constexpr int EACH = LOG_SIZE / PASSES, SHORT = PASSES - LOG_SIZE % PASSES;  // so many passes of EACH bits come first
    constexpr int FIRST = PASS * EACH + (PASS > SHORT ? PASS - SHORT : 0), BITS = EACH + (PASS >= SHORT);
    constexpr int ABOVE = LOG_SIZE - FIRST - BITS, COUNT = 1 << BITS;
    constexpr bool LAST = PASS == PASSES - 1;
    __syncthreads();
    for (int group = threadIdx.x; group < ORDER * (SIZE / COUNT); group += THREADS) {
        const int low = group % (1 << FIRST), high = (group >> FIRST) % (1 << ABOVE), row = group >> (FIRST + ABOVE);
        const int column = (high << (FIRST + BITS)) + low;
        float values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] = y[place(row, column + (i << FIRST))];
#pragma unroll
        for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                if (!(i & half)) {
                    const float a = values[i], b = values[i + half];
                    values[i] = a + b;
                    values[i + half] = a - b;
                }
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
    extern __shared__ __align__(16) u8 room[];
    float* const y = (float*)room;
    const int blocks = inputs / (ORDER * SIZE);
    const u64 token = blockIdx.x / blocks;
    const int first = blockIdx.x % blocks * (ORDER * SIZE);
    const u8* const from = x + token * x_row_bytes + 2 * first;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if ORDER > 1
    u8* const here = room + 4 * ORDER * Y_STRIDE;
    for (int unit = threadIdx.x; unit < ROWS * SIZE / 8; unit += THREADS)
        *(Words*)(here + 2 * (8 * unit / SIZE * X_STRIDE + 8 * unit % SIZE)) = load_words(from + 16 * unit, unit < UNITS);
    __syncthreads();
    multiply_by_paley(paley, here, y);
#else
    for (int unit = threadIdx.x; unit < UNITS; unit += THREADS) {
        const Words words = load_words(from + 16 * unit, true);
#pragma unroll
        for (int i = 0; i < 8; i++)
            y[place(0, 8 * unit + i)] = i % 2 ? high_half(words.at[i / 2]) : low_half(words.at[i / 2]);
    }
#endif
    butterflies<0>(y, rotated + token * inputs + first);
}
