// Activations, quantized to bytes, in the order in which tensor cores meet an arranged weight.
//
// Twin: reference.quantize_input, but for the order. A row of x is cut into chunks of 64 inputs as the
// weight is, and a chunk into UNITS units of 16 inputs. Tokens come in tiles: `out` is [tiles][chunks][tile][UNITS][4] words. A
// token's units are exchanged among themselves ("swizzled"), so that wgmma reads them without bank conflicts.
//
// A block takes ROWS tokens. Constants: KIND (reference.InputKind), FLOAT16, THREADS, ROWS (a
// power of two, 8 at most), ITEMS (quarters of a chunk, of a thread). hopper.cuh comes before.

#define UNITS 4
#define WARPS (THREADS / 32)

// Over the lanes that have the same token.
template <typename T, typename Combine> __device__ __forceinline__ T combined(T value, Combine combine) {
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
        if (other < 4 || other >= 4 * ROWS) value = combine(value, __shfl_xor_sync(0xffffffffu, value, other));
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) arrange_tokens(
    const u8* x, const float* x_step, const u8* x_zero, u32* out, Grid* grids,
    int tokens, int tile, int inputs, int x_stride, int chunks) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4 % ROWS;
    const int token = blockIdx.x * ROWS + row;
    auto quarter_of = [&](int item) { return ((item * WARPS + warp) * (8 / ROWS) + lane / (4 * ROWS)) * 4 + lane % 4; };
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Words words[ITEMS][2];
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int input = quarter_of(item) * 16;
            words[item][half] = load_words(x + ((u64)token * x_stride + input) * 2 + 16 * half, token < tokens && input < inputs);
        }
    auto store = [&](int quarter, int unit, const u32 unit_words[4]) {  // of this token, and of the quarter's chunk
        const u64 row = (u64)(token / tile * chunks + quarter / 4) * tile + token % tile;
        const int place = unit ^ token / 2 % 4;
        if (token < tokens && quarter < 4 * chunks) ((Words*)out)[row * UNITS + place] = *(const Words*)unit_words;
    };
#if KIND == STATIC
    const Grid grid = {*x_step, __frcp_rn(*x_step), *x_zero - 128, 0};
#else
    __shared__ float lows[WARPS][ROWS], highs[WARPS][ROWS];
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 pair = words[item][i / 4].at[i % 4];
            const float a = low_half(pair), b = high_half(pair);
            low = fminf(low, fminf(a, b));
            high = fmaxf(high, fmaxf(a, b));
        }
    auto lower = [](float a, float b) { return fminf(a, b); };
    auto higher = [](float a, float b) { return fmaxf(a, b); };
    lows[warp][row] = combined(low, lower);
    highs[warp][row] = combined(high, higher);
    __syncthreads();
#pragma unroll
    for (int other = 0; other < WARPS; other++) {
        low = fminf(low, lows[other][row]);
        high = fmaxf(high, highs[other][row]);
    }
    const Grid grid = own_grid(low, high, x_step);
#endif
    int total = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int quarter = quarter_of(item);
        Words quantized = {{0, 0, 0, 0}};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32* const pairs = words[item][i / 2].at + i % 2 * 2;
            if (quarter * 16 < inputs)
                quantized.at[i] = __byte_perm(quantized_pair(pairs[0], grid), quantized_pair(pairs[1], grid), 0x5410);
            total = __dp4a((int)quantized.at[i], 0x01010101, total);
        }
        store(quarter, quarter % 4, quantized.at);
    }
    __shared__ int totals[WARPS][ROWS];
    auto sum = [](int a, int b) { return a + b; };
    totals[warp][row] = combined(total, sum);
    __syncthreads();
    if (thread < 4 * ROWS && lane % 4 == 0 && token < tokens) {
        total = 0;
        for (int other = 0; other < WARPS; other++) total += totals[other][row];
        grids[token] = {grid.step, grid.inverse, grid.zero, total};
    }
}
