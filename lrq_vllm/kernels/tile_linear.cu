// y = x W^T for many tokens: tiles of 128 outputs x TOKENS tokens on wgmma.
//
// Twins: reference.integer_linear (INTEGER), reference.weight_only_linear. tile_linear.py compiles this file; arrange_tokens.cu
// made x and `grids`.
//
// The product is computed transposed: 64 outputs are the rows of a wgmma, tokens its columns. Two warpgroups have 64 outputs
// each; one more warp fills a ring of STAGES buffers with STAGE_CHUNKS (even) chunks (64 inputs) of the weight and of x. 8-bit
// weights go to the tensor cores from there, as x does. Others come from registers: while the tensor cores work on one chunk, a
// warpgroup unpacks the next one.
//
// A cluster is SPLIT blocks with the same tile and a part of the inputs each, whose sums are added up through shared memory in
// the end; there is a cluster for each tile then. Otherwise blocks go on with the next tile.
//
// Constants: BITS, INTEGER, FLOAT16, TOKENS, SPLIT, BLOCKS (1 or 2 that share a multiprocessor), STAGE_CHUNKS, STAGES, BAND
// (tiles of tokens that take turns), and the macros of tile_linear.wgmma_macros. hopper.cuh and weight_chunk.cuh come before.

#define UNITS (2 * STEPS)  // of 16 bytes, for a token and chunk
#define STRIPES 8  // of a tile
#define ROW_BYTES (16 * UNITS)
#define TOKEN_BYTES (TOKENS * ROW_BYTES)  // of a chunk
#define WEIGHT_BYTES (STRIPES * STAGE_CHUNKS * CHUNK_BYTES)
#define STAGE_BYTES (WEIGHT_BYTES + STAGE_CHUNKS * TOKEN_BYTES)
#define BOX_CHUNKS (BITS == 8 ? 1 : STAGE_CHUNKS)  // that are fetched at once: 8 x 64 bytes follow each other at 8 bits
#define CONSUMERS 256
#define THREADS (CONSUMERS + 128)
// Registers of a thread: all that there are for those that multiply, a few for the others.
#if BLOCKS == 1
#define MANY "216"  // 2 * 216 + 72 = 3 * 168
#define FEW "72"
#else
#define MANY "104"  // 2 * 104 + 32 = 3 * 80
#define FEW "32"
#endif
#define COLUMNS (TOKENS / 8)  // of 8 tokens

static_assert(STAGE_CHUNKS % 2 == 0);  // chunks take turns with the registers

struct Shared { u64 full[STAGES], empty[STAGES]; };

// What cuTensorMapEncodeTiled makes of the weight: rows are stripes, their elements 8 bytes, boxes STRIPES x BOX_CHUNKS chunks.
struct __align__(64) TensorMap { u64 at[16]; };

__device__ __forceinline__ void fetch_box(void* here, const TensorMap& map, int element, int row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(address(here)), "l"(&map), "r"(element), "r"(row), "r"(address(barrier)) : "memory");
}

// An operand that the tensor cores read from shared memory: rows of 64 or 128 bytes, swizzled by as many.
__device__ __forceinline__ u64 operand(const u8* rows, int row_bytes) {
    return ((u64)address(rows) & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)(8 * row_bytes / 16) << 32 | (row_bytes == 64 ? (u64)2 : (u64)1) << 62;
}

#if BITS == 8
typedef u64 Left;
#else
struct Left { u32 at[4]; };
#endif

__device__ __forceinline__ void multiply(sum_t (&sums)[TOKENS / 2], const Left& w, u64 x) {
    asm volatile(
        "{\n .reg .pred add;\n setp.eq.u32 add, 0, 0;\n"
#if INTEGER
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TOKENS "k32.s32.s8.s8 " WGMMA_OPERANDS ", add;\n}"
#else
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TOKENS "k16.f32." FORMAT "." FORMAT " " WGMMA_OPERANDS ", add, 1, 1, 0;\n}"
#endif
        : WGMMA_SUMS(sums) : WGMMA_LEFT(w), "l"(x));
}

#if !INTEGER
__device__ __forceinline__ u32 minus(u32 pair, u32 other) {
    u32 result;
#if FLOAT16
    asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(other));
#else
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(other));
#endif
    return result;
}
#endif

__device__ __forceinline__ u32 turned(u32 pair) {  // an 8 x 8 matrix of a warp, transposed
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1) tile_linear(
    const __grid_constant__ TensorMap weight, const u8* x, const Grid* grids, const Facts* facts, const unsigned short* bias, unsigned short* y,
    int has_bias, int tokens, int outputs, int chunks, int stripes) {
    extern __shared__ __align__(1024) u8 memory[];
    u8* const ring = memory;
    Shared& shared = *(Shared*)(memory + STAGES * STAGE_BYTES);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int rank = blockIdx.x % SPLIT, cluster = blockIdx.x / SPLIT, clusters = gridDim.x / SPLIT;
    const int wide = (outputs + 127) / 128, high = (tokens + TOKENS - 1) / TOKENS;  // in tiles
    // This block's chunks, and in how many stages they come.
    const int share = ((chunks + SPLIT - 1) / SPLIT + STAGE_CHUNKS - 1) / STAGE_CHUNKS * STAGE_CHUNKS;
    const int first = SPLIT > 1 ? min(rank * share, chunks) : 0, end = min(first + share, chunks);
    const int steps = (end - first + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
    // Tiles near each other in time share tokens or outputs, so that the cache serves them.
    auto place_of = [&](int tile, int& stripe, int& token) {
        const int band = tile / (BAND * wide), within = tile % (BAND * wide), height = min(high - band * BAND, BAND);
        stripe = within / height * STRIPES;
        token = (band * BAND + within % height) * TOKENS;
    };

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init(&shared.full[stage], 1);
            init(&shared.empty[stage], CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
#if SPLIT > 1
    __syncwarp();
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " FEW ";");
        if (thread == CONSUMERS) {
            int stage = 0, parity = 1, before = STAGES;  // stages to fill with weights before the kernel that makes x has ended
            auto fill_weight = [&](int stripe, int begin, int count) {
                expect(&shared.full[stage], WEIGHT_BYTES + count * TOKEN_BYTES);
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk += BOX_CHUNKS) {
                    u8* const here = ring + stage * STAGE_BYTES + chunk * STRIPES * CHUNK_BYTES;
                    fetch_box(here, weight, (begin + chunk) * (CHUNK_BYTES / 8), stripe, &shared.full[stage]);
                }
            };
            auto fill_x = [&](int at, int begin, int count, int token) {
                const u8* const source = x + ((u64)(token / TOKENS) * chunks + begin) * TOKEN_BYTES;
                fetch(ring + at * STAGE_BYTES + WEIGHT_BYTES, source, count * TOKEN_BYTES, &shared.full[at]);
            };
            int stripe, token;
            bool made = false;  // whether x may be read
            for (int tile = cluster; tile < wide * high; tile += clusters) {
                place_of(tile, stripe, token);
                for (int step = 0; step < steps; step++) {
                    const int begin = first + step * STAGE_CHUNKS, count = min(end - begin, STAGE_CHUNKS);
                    wait_for(&shared.empty[stage], parity);
                    fill_weight(stripe, begin, count);
                    if (made) fill_x(stage, begin, count, token);
                    else if (--before == 0 || step == steps - 1) {
                        made = true;
                        asm volatile("griddepcontrol.wait;" ::: "memory");
                        for (int done = 0; done <= step; done++) {
                            const int at = first + done * STAGE_CHUNKS;
                            fill_x(done, at, min(end - at, STAGE_CHUNKS), token);
                        }
                    }
                    if (++stage == STAGES) { stage = 0; parity ^= 1; }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " MANY ";");
        const int row = lane / 4, quarter = lane % 4;
        int stage = 0, parity = 0;
        auto release = [&](int done) {
            if (lane == 0) arrive(&shared.empty[done]);
        };
        for (int tile = cluster; tile < wide * high; tile += clusters) {
            int stripe, token;
            place_of(tile, stripe, token);
            stripe += warp;  // the warp's own: 16 outputs
            const bool inside = stripe < stripes;
            const Facts& of = facts[inside ? stripe : 0];
#if !INTEGER
            u32 zeros[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 zero = of.zero[row + 8 * half];
                zeros[half] = MAGIC + zero * 0x00010001u;  // MAGIC_VALUE + zero, twice
            }
#endif
            sum_t sums[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0;
#if BITS < 8
            Left w[2][STEPS];
            auto unpack = [&](Left (&into)[STEPS], int chunk) {
                const u8* const mine = ring + stage * STAGE_BYTES + (warp * STAGE_CHUNKS + chunk) * CHUNK_BYTES;
                const Chunk loaded = load_chunk(mine, lane);
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    operands(into[step].at, loaded, step);
#if !INTEGER
#pragma unroll
                    for (int i = 0; i < 4; i++) into[step].at[i] = minus(into[step].at[i], zeros[i % 2]);
#endif
                }
            };
#endif
            auto multiply_chunk = [&](int chunk) {
                const u64 right = operand(ring + stage * STAGE_BYTES + WEIGHT_BYTES + chunk * TOKEN_BYTES, ROW_BYTES);
#if BITS < 8
                Left (&left)[STEPS] = w[chunk % 2];
                unpack(left, chunk);
#else
                const Left start = operand(ring + stage * STAGE_BYTES + (chunk * STRIPES + warp / 4 * 4) * CHUNK_BYTES, 64);
                const Left left[STEPS] = {start, start + 32 / 16};
#endif
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int step = 0; step < STEPS; step++) multiply(sums, left[step], right + step * 32 / 16);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            };
#pragma unroll 1
            for (int step = 0; step < steps; step++) {
                const int count = min(end - first - step * STAGE_CHUNKS, STAGE_CHUNKS);
                wait_for(&shared.full[stage], parity);
#pragma unroll
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk++)
                    if (chunk < count) {
                        multiply_chunk(chunk);
                        if (chunk == 0 && step > 0) release(stage ? stage - 1 : STAGES - 1);
                    }
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : WGMMA_SUM(sums[i]) :: "memory");
            if (steps) release(stage ? stage - 1 : STAGES - 1);

#if SPLIT > 1
            // This block's sums, four of a thread and column side by side, where the ring was.
            struct __align__(16) Four { sum_t at[4]; };
            Four* const parts = (Four*)ring;
            asm volatile("bar.sync 1, 256;" ::: "memory");
#pragma unroll
            for (int column = 0; column < COLUMNS; column++)
                parts[column * CONSUMERS + thread] = *(const Four*)&sums[4 * column];
            cluster_arrive();
            cluster_wait();
#endif
            asm volatile("griddepcontrol.wait;" ::: "memory");  // for the kernel that made grids
            const int output = stripe * 16 + row, place = stripe * 16 + (quarter % 2 ? 8 + 2 * (quarter - 1) : 2 * quarter);
            const float step_low = of.step[row], step_high = of.step[row + 8];
#if INTEGER
            const int zero_low = of.zero[row], zero_high = of.zero[row + 8];
            const int total_low = of.total[row], total_high = of.total[row + 8];
#endif
            const float bias_low = has_bias && output < outputs ? low_half(bias[output]) : 0.0f;
            const float bias_high = has_bias && output + 8 < outputs ? low_half(bias[output + 8]) : 0.0f;
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                if (SPLIT > 1 && column % SPLIT != rank) continue;
                sum_t four[4];
#pragma unroll
                for (int i = 0; i < 4; i++) four[i] = sums[4 * column + i];
#if SPLIT > 1
#pragma unroll
                for (int other = 1; other < SPLIT; other++) {
                    u32 there;
                    Four part;
                    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there)
                        : "r"(address(&parts[column * CONSUMERS + thread])), "r"((rank + other) % SPLIT));
                    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(*(u32*)&part.at[0]), "=r"(*(u32*)&part.at[1]), "=r"(*(u32*)&part.at[2]), "=r"(*(u32*)&part.at[3])
                        : "r"(there) : "memory");
#pragma unroll
                    for (int i = 0; i < 4; i++) four[i] += part.at[i];
                }
#endif
                float values[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
#if INTEGER
                    const int mine = token + 8 * column + 2 * quarter + i % 2;
                    const Grid grid = grids[min(mine, tokens - 1)];
                    const int sum = four[i] - grid.zero * (i < 2 ? total_low : total_high) - grid.total * (i < 2 ? zero_low : zero_high);
                    values[i] = __fmul_rn(__fmul_rn((float)sum, grid.step), i < 2 ? step_low : step_high);
#else
                    values[i] = __fmul_rn(four[i], i < 2 ? step_low : step_high);
#endif
                    if (has_bias) values[i] = __fadd_rn(values[i], i < 2 ? bias_low : bias_high);
                }
                // From two tokens of one output to the other way round: lane (token, quarter) gets four outputs of its token.
                const u32 low = turned(half_bits(values[0]) | (u32)half_bits(values[1]) << 16);
                const u32 high_outputs = turned(half_bits(values[2]) | (u32)half_bits(values[3]) << 16);
                const u32 sent = __shfl_xor_sync(0xffffffffu, quarter % 2 ? low : high_outputs, 1);
                const u64 four_outputs = quarter % 2 ? (u64)high_outputs << 32 | sent : (u64)sent << 32 | low;
                const int mine = token + 8 * column + row;
                if (inside && mine < tokens && place < outputs) *(u64*)(y + (u64)mine * outputs + place) = four_outputs;
            }
        }
    }
#if SPLIT > 1
    if (warp >= CONSUMERS / 32) {
        cluster_arrive();  // with the consumers' first one
        cluster_wait();
    }
    __syncwarp();
    cluster_arrive();  // no block ends while another still reads its memory
    cluster_wait();
#endif
}
