// y += U t for few tokens (8 * TILES at most), where t = V^T x is the sum of what low_rank_shrink.cu has left, rounded to 16 bits.
//
// Twin: the second half of reference.add_low_rank. U of the parts that stand one after the other in y have their own ranks. A warp
// takes 16 outputs of a part; it reads rows of U in 16-byte words, before the kernel in front of this one has ended, in chunks of 32
// columns; of a chunk, t is read in the order of those words.
//
// Constants: FLOAT16, TILES, RANKS (of all parts), SHARES, WARPS, MOST (the largest rank of a part, filled up to chunks), PARTS and
// PART (of each: the first block, the first output, outputs, the first rank, rank, where its U begins). hopper.cuh comes before.

#define TOKENS (8 * TILES)
#define OUTPUTS (16 * WARPS)  // of a block
#define CHUNKS (MOST / 32)
#define AHEAD (CHUNKS < 13 ? CHUNKS : 13)  // chunks that are read ahead
#define T_STRIDE (MOST + 8)  // of a token's t in shared memory

struct Part { int block, output, outputs, rank, ranks; u64 u; };
__constant__ Part parts[PARTS] = {PART};

extern "C" __global__ void __launch_bounds__(32 * WARPS) low_rank_expand(
    const u8* u, const float* __restrict__ sums, unsigned short* y, int tokens, int y_row) {
    extern __shared__ __align__(16) unsigned short t[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, unit = lane % 4;
    int own = 0;
#pragma unroll
    for (int other = 1; other < PARTS; other++) own += (int)blockIdx.x >= parts[other].block;
    const Part part = parts[own];
    const int first = (blockIdx.x - part.block) * OUTPUTS + 16 * warp + row;
    auto weights_of = [&](int chunk, int half) {
        const int output = first + 8 * half, rank = 32 * chunk + 8 * unit;
        return load_words(u + 2 * (part.u + (u64)output * part.ranks + rank), output < part.outputs && rank < part.ranks);
    };
    Words ahead[AHEAD][2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) ahead[i][half] = weights_of(i, half);
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll 4
    for (int index = threadIdx.x; index < TOKENS * MOST / 4; index += 32 * WARPS) {
        const int token = index / (MOST / 4), rank = 4 * (index % (MOST / 4));
        const bool inside = token < tokens && rank < part.ranks;
        float sum[4] = {};
#pragma unroll
        for (int share = 0; share < SHARES; share++) {
            const Words words = load_words(sums + ((u64)share * tokens + token) * RANKS + part.rank + rank, inside);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += __uint_as_float(words.at[i]);
        }
        *(uint2*)(t + token * T_STRIDE + rank) = {half_pair(sum[0], sum[1]), half_pair(sum[2], sum[3])};
    }
    __syncthreads();
    float added[TILES][4] = {};
    for (int chunk = 0; chunk < CHUNKS; chunk += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const Words (&w)[2] = ahead[i];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const Words given = load_words(t + (8 * tile + row) * T_STRIDE + 32 * (chunk + i) + 8 * unit, chunk + i < CHUNKS);
                multiply_words(added[tile], w, given);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) ahead[i][half] = weights_of(chunk + i + AHEAD, half);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = 8 * tile + 2 * unit + i % 2, output = first + i / 2 * 8;
            if (token < tokens && output < part.outputs) {
                unsigned short* const here = y + (u64)token * y_row + part.output + output;
                *here = half_bits(low_half(*here) + added[tile][i]);
            }
        }
}
