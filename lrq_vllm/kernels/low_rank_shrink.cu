// V^T x for few tokens (8 * TILES at most), as float32 sums over a share of the inputs each.
//
// Twin: the first half of reference.add_low_rank. Stripes of 16 rows of V^T are the rows of a tensor-core tile, tokens its columns.
// A stripe's inputs are divided among SHARES blocks, and those of a block among its warps, in chunks of 32. Rows of V^T are read in
// 16-byte words, before the kernel in front of this one has ended. A lane's word stands for the inputs of two steps of a tensor
// core, in another order than the instruction counts them: the same for x.
//
// Constants: FLOAT16, TILES, INPUTS, RANKS (rows of V^T, a multiple of 16), SHARES, WARPS, TURNS (chunks of a warp), AHEAD (chunks
// that are read ahead). hopper.cuh comes before.

#define TOKENS (8 * TILES)

extern "C" __global__ void __launch_bounds__(32 * WARPS) low_rank_shrink(
    const u8* v, const u8* x, float* sums, int tokens, int x_row_bytes) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, unit = lane % 4;
    const int stripe = blockIdx.x / SHARES, share = blockIdx.x % SHARES;
    auto input_of = [&](int turn) { return 32 * ((turn * SHARES + share) * WARPS + warp) + 8 * unit; };
    auto weights_of = [&](int turn, int half) {
        const int input = input_of(turn);
        return load_words(v + 2 * ((u64)(16 * stripe + row + 8 * half) * INPUTS + input), input < INPUTS);
    };
    Words ahead[AHEAD][2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) ahead[i][half] = weights_of(i, half);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    float own[TILES][4] = {};
    for (int turn = 0; turn < TURNS; turn += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int input = input_of(turn + i);
            const Words (&w)[2] = ahead[i];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int token = 8 * tile + row;
                const Words given = load_words(x + (u64)token * x_row_bytes + 2 * input, input < INPUTS && token < tokens);
                multiply_words(own[tile], w, given);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) ahead[i][half] = weights_of(turn + i + AHEAD, half);
        }
    }
    __shared__ float parts[WARPS][TOKENS][16];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) parts[warp][8 * tile + 2 * unit + i % 2][row + i / 2 * 8] = own[tile][i];
    __syncthreads();
    for (int index = threadIdx.x; index < 16 * tokens; index += 32 * WARPS) {
        const int token = index / 16, rank = index % 16;
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < WARPS; other++) sum += parts[other][token][rank];
        sums[((u64)share * tokens + token) * RANKS + 16 * stripe + rank] = sum;
    }
}
