// Activations, quantized to bytes, row by row as they came; or the sums of those that are quantized already (KIND == QUANTIZED).
//
// Twin: reference.quantize_input. A block takes a token.
//
// Constants: KIND (reference.InputKind, or QUANTIZED), FLOAT16, THREADS, ITEMS (units of 16 inputs, of a thread), IN_PAIRS (whether
// a token's range is found two values at a time). hopper.cuh comes before.

#define WARPS (THREADS / 32)

// Over the threads of the block; `room` is written.
template <typename T, typename Combine> __device__ __forceinline__ T combined(T value, T (&room)[WARPS], Combine combine) {
#pragma unroll
    for (int other = 1; other < 32; other *= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, other));
    room[threadIdx.x / 32] = value;
    __syncthreads();
    value = room[0];
#pragma unroll
    for (int other = 1; other < WARPS; other++) value = combine(value, room[other]);
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize_tokens(
    const u8* x, const float* x_step, const u8* x_zero, u8* q, float* steps, int* zeros, int* totals, int inputs, int x_row_bytes) {
    const u64 token = blockIdx.x;
    auto input_of = [&](int item) { return 16 * (item * THREADS + (int)threadIdx.x); };
    const u8* const row = x + token * x_row_bytes;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int total = 0;
#if KIND == QUANTIZED
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const Words words = load_words(row + input_of(item), input_of(item) < inputs);
#pragma unroll
        for (int i = 0; i < 4; i++) total = __dp4a((int)words.at[i], 0x01010101, total);
    }
#else
    Words words[ITEMS][2];
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            words[item][half] = load_words(row + 2 * input_of(item) + 16 * half, input_of(item) < inputs);
#if KIND == STATIC
    const Grid grid = {*x_step, __frcp_rn(*x_step), *x_zero - 128, 0};
#else
    float low = 0.0f, high = 0.0f;
#if IN_PAIRS
    u32 smallest = 0, largest = 0;  // 0 is among the values
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            smallest = smaller_halves(smallest, words[item][i / 4].at[i % 4]);
            largest = larger_halves(largest, words[item][i / 4].at[i % 4]);
        }
    low = fminf(low_half(smallest), high_half(smallest));
    high = fmaxf(low_half(largest), high_half(largest));
#else
#pragma unroll
    for (int item = 0; item < ITEMS; item++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 pair = words[item][i / 4].at[i % 4];
            const float a = low_half(pair), b = high_half(pair);
            low = fminf(low, fminf(a, b));
            high = fmaxf(high, fmaxf(a, b));
        }
#endif
    __shared__ float lows[WARPS], highs[WARPS];
    low = combined(low, lows, [](float a, float b) { return fminf(a, b); });
    high = combined(high, highs, [](float a, float b) { return fmaxf(a, b); });
    const Grid grid = own_grid(low, high, x_step);
#endif
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        Words quantized;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32* const pairs = words[item][i / 2].at + i % 2 * 2;
            quantized.at[i] = __byte_perm(quantized_pair(pairs[0], grid), quantized_pair(pairs[1], grid), 0x5410);
        }
        if (input_of(item) < inputs) {
#pragma unroll
            for (int i = 0; i < 4; i++) total = __dp4a((int)quantized.at[i], 0x01010101, total);
            *(Words*)(q + token * inputs + input_of(item)) = quantized;
        }
    }
#endif
    __shared__ int sums[WARPS];
    total = combined(total, sums, [](int a, int b) { return a + b; });
    if (threadIdx.x == 0) {
        totals[token] = total;
#if KIND != QUANTIZED
        steps[token] = grid.step;
        zeros[token] = grid.zero;
#endif
    }
}
