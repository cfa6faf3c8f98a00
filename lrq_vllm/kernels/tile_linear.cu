// y = x W^T for many tokens: tiles of 128 outputs x TOKENS tokens on wgmma.
//
// Twins: reference.integer_linear (INTEGER), reference.weight_only_linear. tile_linear.py compiles this file. If INTEGER, x is
// quantized already.
//
// The product is computed transposed: 64 outputs are the rows of a wgmma, tokens its columns. Two warpgroups multiply; one more
// warp fills a ring of STAGES buffers with STAGE_CHUNKS (even) chunks (64 inputs) of the weight and of x. 8-bit weights go to the
// tensor cores from there, as x does. Others come from registers: while the tensor cores work on one chunk, a warpgroup unpacks
// the next one. Each has 64 outputs of a tile. Or, with 8-bit weights, TEAM is 1: a tile is one warpgroup's, and they take turns,
// so that one multiplies while the other writes.
//
// If CENTRED, a stage is a part of one group of inputs, whose step s its products have. The tensor cores go on adding up P, and it
// is P_g (s_g - s_(g+1)) that is added as a float for every stage g. P begins with the bits of a float that has integers as its last
// bits, so that nothing is converted.
//
// A cluster is SPLIT blocks with the same tile and a part of the inputs each, which send each other their sums in the end; there
// is a cluster for each tile then. Or it is SHARE blocks with the same tokens and outputs next to each other: each fetches a part
// of the tokens for all. Otherwise, and then too, blocks go on with the next tile.
//
// Or, if EVEN, every cluster has as much work, however many tiles there are: a span of all stages of all tiles ("Stream-K",
// arXiv 2301.03598). Who has the first stages of a tile finishes it, with the sums of those that have the others, which come by
// way of global memory.
//
// If CORRECTED, a low-rank correction U t is added (twin: reference.add_low_rank; t = V^T x, in 16 bits). Behind its other stages a
// tile has those of U and t, RANK_BYTES of an output or a token at a time, which the tensor cores add to the sums when they have been
// scaled. The outputs are up to PARTS parts that follow each other, each with its own U and columns of t.
//
// Constants: BITS, INTEGER, FLOAT16, GROUPED, TOKENS, SPLIT, SHARE (one of them is 1), EVEN (SPLIT is 1 then), BLOCKS (1 or 2 that
// share a multiprocessor), TEAM (warpgroups that share a tile: 2 or 1), RANK_BYTES (0 if nothing is CORRECTED; else 64 or 128, SPLIT
// is 1 and TEAM 2), STAGE_CHUNKS, STAGES, BAND (tiles of tokens that take turns),
// CENTRED (whether steps are of groups that meet integers), WARPS (8, that multiply), ROW_BYTES (128 of x, that are fetched at once: a line of the cache), and the macros of
// tile_linear._wgmma_macros. hopper.cuh and weight_chunk.cuh come before.

#define STRIPES 8  // of a tile
#define WEIGHT_BYTES (STRIPES * STAGE_CHUNKS * CHUNK_BYTES)
#define BOX_CHUNKS (BITS == 8 ? 1 : STAGE_CHUNKS)  // of the weight, that are fetched at once: 8 x 64 bytes follow each other at 8 bits
#define ROW_CHUNKS (INTEGER ? 2 : 1)
#define TOKEN_BYTES (TOKENS * ROW_BYTES)
#define STAGE_BYTES (WEIGHT_BYTES + STAGE_CHUNKS / ROW_CHUNKS * TOKEN_BYTES)
#define CONSUMERS (32 * WARPS)
#define THREADS (CONSUMERS + 128)
// Registers of a thread: all that there are for those that multiply, a few for the others. 2 * MANY + FEW is 3 * 168 or 3 * 80.
#if BLOCKS == 2
#define MANY "104"
#define FEW "32"
#else
#define MANY "216"
#define FEW "72"
#endif
#define COLUMNS (TOKENS / 8)  // of 8 tokens
#define CLUSTER (SPLIT * SHARE)
#define TEAM_WARPS (4 * TEAM)  // that share a tile
#define SLABS (2 / TEAM)  // of 64 outputs, that a warpgroup has of a tile
#define OWN_COLUMNS ((COLUMNS + SPLIT - 1) / SPLIT)  // that a block finishes, at most
#define WINDOW 16  // stages whose products are summed up before they are put back to BIAS: 16 * 128 * 128 * 15 is below 2^22
#define BIAS 0x4b400000  // the bits of 1.5 * 2^23
#define BUFFERS (BLOCKS == 1 ? 2 : 1)  // of unpacked stages: one is filled while the tensor cores read the other
#define PIECE (SPLIT == 1 ? 2 : 1)  // columns that a warp writes at a time
#define CORRECTED (RANK_BYTES > 0)
#define PARTS 3  // at most, that a correction has
#define RANKS (RANK_BYTES / 2)  // of a stage
#define U_BYTES (128 * RANK_BYTES)

static_assert(STAGE_CHUNKS % 2 == 0);  // chunks take turns with the registers
static_assert(!CENTRED || STAGE_CHUNKS == 2 && TOKENS <= 128);  // a part of one group; registers for two kinds of sums
static_assert(SPLIT == 1 || SHARE == 1);
static_assert(!EVEN || SPLIT == 1);
static_assert(TEAM == 2 || BITS == 8 && SPLIT == 1 && !EVEN && BLOCKS == 1);
static_assert(!CORRECTED || SPLIT == 1 && TEAM == 2 && U_BYTES + TOKENS * RANK_BYTES <= STAGE_BYTES);

struct Shared {
    u8 turned[WARPS][PIECE * 256];  // of a piece: 8 tokens x 8 outputs, for each column and half of the warp's outputs
#if INTEGER
    Grid grids[2][TOKENS];  // of a tile, for each warpgroup
    Facts facts[2][STRIPES];
#endif
    u64 full[STAGES], empty[STAGES], facts_full[2];
    u64 turn[2];  // of each team, if there are two
    u64 parts_full;  // what the other blocks sum up has come
};

// What cuTensorMapEncodeTiled makes of an array with elements of 8 bytes. The weight: rows are stripes, boxes STRIPES x BOX_CHUNKS
// chunks. x: rows are tokens, boxes TOKENS / SHARE x ROW_BYTES, swizzled by as many.
struct __align__(64) TensorMap { u64 at[16]; };

__device__ __forceinline__ void fetch_box(void* here, const TensorMap& map, int element, int row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(address(here)), "l"(&map), "r"(element), "r"(row), "r"(address(barrier)) : "memory");
}

// As that, but to the same place in each block of the cluster, and each block's barrier learns of it.
#define ALL_BLOCKS ((unsigned short)((1 << CLUSTER) - 1))
__device__ __forceinline__ void fetch_box_for_all(void* here, const TensorMap& map, int element, int row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(address(here)), "l"(&map), "r"(element), "r"(row), "r"(address(barrier)), "h"(ALL_BLOCKS) : "memory");
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

// sums += w x.
__device__ __forceinline__ void multiply(product_t (&sums)[TOKENS / 2], const Left& w, u64 x) {
    asm volatile(
        "{\n .reg .pred add;\n setp.eq.u32 add, 0, 0;\n"
#if INTEGER
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TOKENS "k32.s32." WEIGHT_TYPE ".s8 " WGMMA_OPERANDS ", add;\n}"
#else
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TOKENS "k16.f32." FORMAT "." FORMAT " " WGMMA_OPERANDS ", add, 1, 1, 0;\n}"
#endif
        : WGMMA_SUMS(sums) : WGMMA_LEFT(w), "l"(x));
}

#if CORRECTED
// sums += u t.
__device__ __forceinline__ void multiply_ranks(float (&sums)[TOKENS / 2], u64 u, u64 t) {
    asm volatile(
        "{\n .reg .pred add;\n setp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TOKENS "k16.f32." FORMAT "." FORMAT " " RANK_OPERANDS ", add, 1, 1, 0, 0;\n}"
        : RANK_SUMS(sums) : "l"(u), "l"(t));
}
#endif

#if !INTEGER
// Weights that meet 16-bit activations are (q - zero_point) * FRACTION: an operand times FRACTION / UNIT, less the rest.
#if FLOAT16
#define FRACTION 0x1p-9f
#define ONE_BY_UNIT 0x7800u  // as 16-bit floats: FRACTION / UNIT
#define HIGH_BY_UNIT (0x7800u - (HIGH_BITS << 10))  // ... / 2^HIGH_BITS
#else
#define FRACTION 0x1p-6f
#define ONE_BY_UNIT 0x7f00u
#define HIGH_BY_UNIT (0x7f00u - (HIGH_BITS << 7))
#endif

__device__ __forceinline__ u32 scaled(u32 pair, u32 factor, u32 offset) {
    u32 result;
#if FLOAT16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(factor), "r"(offset));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(factor), "r"(offset));
#endif
    return result;
}
#endif

// 8 x 8 matrices of a warp, in fragments, into rows of shared memory, transposed: a lane says where one row goes.
__device__ __forceinline__ void store_turned(u32 row, const u32 (&matrices)[2 * PIECE]) {
#if SPLIT == 1
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
        ::"r"(row), "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3]) : "memory");
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
        ::"r"(row), "r"(matrices[0]), "r"(matrices[1]) : "memory");
#endif
}

#if EVEN
// A word of global memory that a warp sets when others may read what its lanes have written.
__device__ __forceinline__ void set_flag(int* flag, int lane) {
    __syncwarp();
    if (lane == 0) asm volatile("fence.acq_rel.gpu;\n st.relaxed.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

// And that the one who reads it sets back, for the next launch.
__device__ __forceinline__ void wait_for_flag(int* flag) {
    int set;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
    while (!set);
    *flag = 0;
}

// Past the first-level cache, which other multiprocessors' stores do not reach.
__device__ __forceinline__ void store_sums(void* there, const sum_t* four) {
    const u32* const words = (const u32*)four;
    asm volatile("st.global.cg.v4.b32 [%0], {%1, %2, %3, %4};"
        ::"l"(there), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

__device__ __forceinline__ Words load_sums(const void* from) {
    Words four;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(four.at[0]), "=r"(four.at[1]), "=r"(four.at[2]), "=r"(four.at[3]) : "l"(from));
    return four;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(CLUSTER, 1, 1) tile_linear(
    const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const float* x_steps, const u8* x_zeros,
    const int* x_totals, const Facts* facts, const unsigned short* bias, unsigned short* y, u8* parts, int* flags,
    int x_kind, int has_bias, int tokens, int outputs, int chunks, int stripes
#if CORRECTED
    , const __grid_constant__ TensorMap t, const __grid_constant__ TensorMap u0, const __grid_constant__ TensorMap u1,
    const __grid_constant__ TensorMap u2, int begin1, int begin2, int rank0, int rank1, int rank2
#endif
) {
    extern __shared__ __align__(1024) u8 memory[];
    u8* const ring = memory;
    Shared& shared = *(Shared*)(memory + STAGES * STAGE_BYTES);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int wide = (outputs + 128 * SHARE - 1) / (128 * SHARE), high = (tokens + TOKENS - 1) / TOKENS;  // in clusters' tiles
    // This block's chunks, and in how many stages they come.
    const int share = ((chunks + SPLIT - 1) / SPLIT + STAGE_CHUNKS - 1) / STAGE_CHUNKS * STAGE_CHUNKS;
    const int first = SPLIT > 1 ? min(rank * share, chunks) : 0, end = min(first + share, chunks);
    const int steps = (end - first + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
#if EVEN
    // Who finishes a tile waits for the spans behind its own: those of blocks that began before it.
    const int span = clusters - 1 - cluster;
    auto begin_of = [&](int span) { return (int)((u64)wide * high * steps * span / clusters); };
    const int start = begin_of(span), last = begin_of(span + 1);
#else
    const int start = cluster, last = wide * high;
#endif
    // Stages of a tile, and where this block goes on then.
    struct Work { int tile, begin, end, next; };
    auto work_at = [&](int at, int stride) -> Work {
#if EVEN
        const int begin = at % steps, end = min(steps, begin + last - at);
        return {at / steps, begin, end, at + end - begin};
#else
        return {at, 0, steps, at + stride};
#endif
    };
    // Tiles near each other in time share tokens or outputs, so that the cache serves them.
    auto place_of = [&](int tile, int& stripe, int& token) {
        const int band = tile / (BAND * wide), within = tile % (BAND * wide), height = min(high - band * BAND, BAND);
        stripe = (within / height * SHARE + rank % SHARE) * STRIPES;
        token = (band * BAND + within % height) * TOKENS;
    };

#if CORRECTED
    // The part that a tile's outputs belong to: its U, first output, first column of t, and how many there are. All blocks of a
    // cluster, which fetch t for each other, take that of the first one's tile: others may lie behind the last output.
    struct Part { const TensorMap* u; int begin, column, ranks; };
    auto part_of = [&](int stripe) -> Part {
        const int output = (stripe - rank % SHARE * STRIPES) * 16;
        if (output < begin1) return {&u0, 0, 0, rank0};
        if (output < begin2) return {&u1, begin1, rank0, rank1};
        return {&u2, begin2, rank0 + rank1, rank2};
    };
#endif

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init(&shared.full[stage], 1);
            init(&shared.empty[stage], TEAM_WARPS * SHARE);
        }
        for (int group = 0; group < 2; group++) {
            init(&shared.facts_full[group], 1);
            init(&shared.turn[group], TEAM_WARPS);
        }
        init(&shared.parts_full, 1);
        if (SPLIT > 1) expect(&shared.parts_full, (SPLIT - 1) * ((COLUMNS - rank + SPLIT - 1) / SPLIT) * CONSUMERS * 16);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
#if SHARE > 1
    __syncwarp();
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " FEW ";");
        if (thread == CONSUMERS) {
            int stage = 0, parity = 1, before = STAGES;  // stages to fill with weights before the kernel that makes x has ended
            auto fill_weight = [&](int stripe, int begin, int count) {
                expect(&shared.full[stage], WEIGHT_BYTES + (count + ROW_CHUNKS - 1) / ROW_CHUNKS * TOKEN_BYTES);
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk += BOX_CHUNKS) {
                    u8* const here = ring + stage * STAGE_BYTES + chunk * STRIPES * CHUNK_BYTES;
                    fetch_box(here, weight, (begin + chunk) * (CHUNK_BYTES / 8), stripe, &shared.full[stage]);
                }
            };
            auto fill_x = [&](int at, int begin, int count, int token) {
                u8* const here = ring + at * STAGE_BYTES + WEIGHT_BYTES;
                [[maybe_unused]] const int part = rank % SHARE * (TOKEN_BYTES / SHARE);
                for (int row = 0; row * ROW_CHUNKS < count; row++) {
                    const int element = (begin / ROW_CHUNKS + row) * (ROW_BYTES / 8);
#if SHARE > 1
                    fetch_box_for_all(here + row * TOKEN_BYTES + part, x, element, token + part / ROW_BYTES, &shared.full[at]);
#else
                    fetch_box(here + row * TOKEN_BYTES, x, element, token, &shared.full[at]);
#endif
                }
            };
            int stripe, token;
            bool made = false;  // whether x may be read
            Work work;
            for (int at = start; at < last; at = work.next) {
                work = work_at(at, clusters);
                place_of(work.tile, stripe, token);
                for (int step = work.begin; step < work.end; step++) {
                    const int begin = first + step * STAGE_CHUNKS, count = min(end - begin, STAGE_CHUNKS);
                    wait_for(&shared.empty[stage], parity);
                    fill_weight(stripe, begin, count);
                    if (made) fill_x(stage, begin, count, token);
                    else if (--before == 0 || step == work.end - 1) {
                        made = true;
                        asm volatile("griddepcontrol.wait;" ::: "memory");
                        for (int done = work.begin; done <= step; done++) {
                            const int chunk = first + done * STAGE_CHUNKS;
                            fill_x(done - work.begin, chunk, min(end - chunk, STAGE_CHUNKS), token);
                        }
                    }
                    if (++stage == STAGES) { stage = 0; parity ^= 1; }
                }
#if CORRECTED
                if (work.begin == 0) {
                    const Part part = part_of(stripe);
                    for (int rank_at = 0; rank_at < part.ranks; rank_at += RANKS) {
                        wait_for(&shared.empty[stage], parity);
                        expect(&shared.full[stage], U_BYTES + TOKENS * RANK_BYTES);
                        u8* const here = ring + stage * STAGE_BYTES;
                        fetch_box(here, *part.u, rank_at * 2 / 8, stripe * 16 - part.begin, &shared.full[stage]);
                        const int element = (part.column + rank_at) * 2 / 8;
#if SHARE > 1
                        const int row = rank % SHARE * (TOKENS / SHARE);
                        fetch_box_for_all(here + U_BYTES + row * RANK_BYTES, t, element, token + row, &shared.full[stage]);
#else
                        fetch_box(here + U_BYTES, t, element, token, &shared.full[stage]);
#endif
                        if (++stage == STAGES) { stage = 0; parity ^= 1; }
                    }
                }
#endif
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " MANY ";");
        [[maybe_unused]] const int row = lane / 4, quarter = lane % 4;
        int stage = 0, parity = 0;
        auto release = [&](int done) {
#if SHARE > 1
            if (lane < SHARE) arrive_in_block(&shared.empty[done], lane);
#else
            if (lane == 0) arrive(&shared.empty[done]);
#endif
        };
        [[maybe_unused]] const int group = warp / 4;
        [[maybe_unused]] int facts_parity = 0;
        // Of a tile: where this warp has 16 outputs.
        auto stripe_of = [&](int slab) { return TEAM == 2 ? warp : 4 * slab + warp % 4; };
#if TEAM == 1
        auto pass = [&] {  // the stages of the other team's tile
            stage += steps;
            parity ^= stage / STAGES % 2;
            stage %= STAGES;
        };
        // A barrier tells its phase by parity alone: a team waits for its stages only when the other has seen all of its own full.
        int turn_parity = 1 - group;  // the first turn is there already
        if (group == 1) pass();
        const int own_start = start + group * clusters, stride = 2 * clusters;
#else
        const int own_start = start, stride = clusters;
#endif
        [[maybe_unused]] const int zero_of_all = INTEGER ? common_zero(x_kind, x_zeros) : 0;
        Work work;
        for (int at = own_start; at < last; at = work.next) {
            work = work_at(at, stride);
            int stripe, token;
            place_of(work.tile, stripe, token);
            [[maybe_unused]] const bool finishes = work.begin == 0;
#if INTEGER
            if (finishes) {
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");  // the warpgroup is done with the tile before
                if (thread % 128 == 0) {
                    const int bytes = min(max(stripes - stripe, 0), STRIPES) * sizeof(Facts);
                    expect(&shared.facts_full[group], bytes);
                    if (bytes) fetch(shared.facts[group], facts + stripe, bytes, &shared.facts_full[group]);
                }
                asm volatile("griddepcontrol.wait;" ::: "memory");  // for the kernel that made x and its grids
                for (int own = thread % 128; own < min(tokens - token, TOKENS); own += 128) {
                    Grid& grid = shared.grids[group][own];
                    fetch_word(&grid.step, x_steps + own_step(x_kind, token + own));
                    fetch_word(&grid.total, x_totals + token + own);
                    if (x_kind == PER_TOKEN) fetch_word(&grid.zero, (const int*)x_zeros + token + own);
                    else grid.zero = zero_of_all;
                }
            }
#else
            const Facts& of = facts[min(stripe + warp, stripes - 1)];
            float steps_of[2];  // of outputs g and g + 8
            u32 offsets[2];  // -zero_point
#pragma unroll
            for (int i = 0; i < 2; i++) {
                steps_of[i] = of.step[row + 8 * i] / FRACTION;
                offsets[i] = half_bits(-FRACTION * of.zero[row + 8 * i]) * 0x00010001u;
            }
#endif
            sum_t sums[SLABS][TOKENS / 2];
#pragma unroll
            for (int i = 0; i < SLABS * TOKENS / 2; i++) sums[i / (TOKENS / 2)][i % (TOKENS / 2)] = 0;
#if CENTRED
            product_t products[TOKENS / 2];  // of up to WINDOW stages, plus BIAS
            auto begin_products = [&] {
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) products[i] = BIAS;
            };
            begin_products();
            Left w[BUFFERS][STAGE_CHUNKS][STEPS];
            float group_steps[2], steps_before[2] = {0.0f, 0.0f};  // of outputs g and g + 8, of this stage's group and the last one's
            auto wait_for_products = [&] { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); };
            auto scale = [&](float low, float high) {
                wait_for_products();
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) {
                    asm volatile("" : WGMMA_SUM(products[i]) :: "memory");
                    sums[0][i] += (i / 2 % 2 ? high : low) * (__int_as_float(products[i]) - __int_as_float(BIAS));
                }
            };
#elif BITS < 8
            Left w[2][STEPS];
#endif
#if BITS < 8
            auto unpack = [&](Left (&into)[STEPS], int chunk) {
                const u8* const mine = ring + stage * STAGE_BYTES + (warp * STAGE_CHUNKS + chunk) * CHUNK_BYTES;
                const Chunk loaded = load_chunk(mine, lane);
#if CENTRED
                for (int i = 0; i < 2; i++) group_steps[i] = loaded.groups[i].step;
#elif GROUPED
                u32 factors[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    offsets[i] = half_bits(-FRACTION * (float)loaded.groups[i].zero) * 0x00010001u;
                    factors[i] = half_bits(loaded.groups[i].step) * 0x00010001u;
                }
#endif
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    operands(into[step].at, loaded, step);
#if !INTEGER
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        u32& pair = into[step].at[i];
                        pair = scaled(pair, (i % 2 ? HIGH_BY_UNIT : ONE_BY_UNIT) * 0x00010001u, offsets[i % 2]);
#if GROUPED
                        pair = scaled(pair, factors[i % 2], 0x80008000u);  // plus -0
#endif
                    }
#endif
                }
            };
#endif
#if TEAM == 1
            wait_for(&shared.turn[group], turn_parity);
            turn_parity ^= 1;
#endif
            auto tokens_of = [&](const u8* stage_at, int chunk) {
                const u64 row = operand(stage_at + WEIGHT_BYTES + chunk / ROW_CHUNKS * TOKEN_BYTES, ROW_BYTES);
                return row + chunk % ROW_CHUNKS * (ROW_BYTES / ROW_CHUNKS / 16);
            };
#if CENTRED
            int step = work.begin;
            // anew: with products that begin again.
            auto take = [&](Left (&left)[STAGE_CHUNKS][STEPS], bool anew) {
                wait_for(&shared.full[stage], parity);
                if (BUFFERS == 1) wait_for_products();
#pragma unroll
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk++) unpack(left[chunk], chunk);
#pragma unroll
                for (int i = 0; i < STAGE_CHUNKS * STEPS * 4; i++)  // before the wait, not behind it
                    asm volatile("" : "+r"(left[i / 4 / STEPS][i / 4 % STEPS].at[i % 4]) :: "memory");
                scale(steps_before[0] - (anew ? 0.0f : group_steps[0]), steps_before[1] - (anew ? 0.0f : group_steps[1]));
                if (step > work.begin) release(stage ? stage - 1 : STAGES - 1);
                if (anew) {
                    asm volatile("" ::: "memory");
                    begin_products();
                }
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < STAGE_CHUNKS * STEPS; i++)
                    multiply(products, left[i / STEPS][i % STEPS], tokens_of(ring + stage * STAGE_BYTES, i / STEPS) + i % STEPS * 32 / 16);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                for (int i = 0; i < 2; i++) steps_before[i] = group_steps[i];
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
                step++;
            };
#pragma unroll 1
            while (step < work.end) {
                take(w[0], (step - work.begin) % WINDOW == 0);
                if (step == work.end) break;
                take(w[BUFFERS - 1], false);
            }
#else
#pragma unroll 1
            for (int step = work.begin; step < work.end; step++) {
                wait_for(&shared.full[stage], parity);
                const u8* const weights_of = ring + stage * STAGE_BYTES;
#if BITS == 8
                // Chunks behind the last one came as zeros.
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk++)
#pragma unroll
                    for (int slab = 0; slab < SLABS; slab++) {
                        const Left left = operand(weights_of + (chunk * STRIPES + stripe_of(slab) / 4 * 4) * CHUNK_BYTES, 64);
#pragma unroll
                        for (int at = 0; at < STEPS; at++) multiply(sums[slab], left + at * 32 / 16, tokens_of(weights_of, chunk) + at * 32 / 16);
                    }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (step > work.begin) release(stage ? stage - 1 : STAGES - 1);
#else
                const int count = min(end - first - step * STAGE_CHUNKS, STAGE_CHUNKS);
#pragma unroll
                for (int chunk = 0; chunk < STAGE_CHUNKS; chunk++)
                    if (chunk < count) {
                        Left (&left)[STEPS] = w[chunk % 2];
                        unpack(left, chunk);
                        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                        for (int at = 0; at < STEPS; at++) multiply(sums[0], left[at], tokens_of(weights_of, chunk) + at * 32 / 16);
                        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                        if (chunk == 0 && step > work.begin) release(stage ? stage - 1 : STAGES - 1);
                    }
#endif
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
#endif
#if TEAM == 1
            if (lane == 0) arrive(&shared.turn[1 - group]);
#endif
#if CENTRED
            scale(steps_before[0], steps_before[1]);
#else
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int i = 0; i < SLABS * TOKENS / 2; i++) asm volatile("" : WGMMA_SUM(sums[i / (TOKENS / 2)][i % (TOKENS / 2)]) :: "memory");
#endif
            if (work.end > work.begin) release(stage ? stage - 1 : STAGES - 1);
#if TEAM == 1
            pass();
#endif

#if SPLIT > 1
            // Every block finishes each so-manieth column; the others send their sums of it to where the ring was.
            sum_t (*const parts)[CONSUMERS][4] = (sum_t (*)[CONSUMERS][4])ring;
            cluster_arrive();
            cluster_wait();  // nobody uses the ring any more
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                const int owner = column % SPLIT, sender = (rank - owner + SPLIT - 1) % SPLIT;
                Words four;
#pragma unroll
                for (int i = 0; i < 4; i++) four.at[i] = *(const u32*)&sums[0][4 * column + i];
                if (owner != rank) send_words(parts[sender * OWN_COLUMNS + column / SPLIT][thread], owner, four, &shared.parts_full);
            }
            wait_for_blocks(&shared.parts_full);
#endif
            asm volatile("griddepcontrol.wait;" ::: "memory");  // somebody may still read what will be y
#if EVEN
            // Of a span: this warp's flag, and this thread's sums of a column.
            auto flag_of = [&](int span) { return flags + (span * SHARE + rank) * WARPS + warp; };
            auto sums_of = [&](int span, int column) {
                return parts + ((u64)((span * SHARE + rank) * COLUMNS + column) * CONSUMERS + thread) * sizeof(Words);
            };
            if (!finishes) {
#pragma unroll
                for (int column = 0; column < COLUMNS; column++) store_sums(sums_of(span, column), &sums[0][4 * column]);
                set_flag(flag_of(span), lane);
                continue;
            }
            if (work.end < steps) {
                const int tile_end = (work.tile + 1) * steps;
                for (int other = span + 1 + lane; begin_of(other) < tile_end; other += 32) wait_for_flag(flag_of(other));
                __syncwarp();
                for (int other = span + 1; begin_of(other) < tile_end; other++)
#pragma unroll
                    for (int column = 0; column < COLUMNS; column++) {
                        const Words four = load_sums(sums_of(other, column));
#pragma unroll
                        for (int i = 0; i < 4; i++) sums[0][4 * column + i] += *(const sum_t*)&four.at[i];
                    }
            }
#endif
#if INTEGER
            wait_for(&shared.facts_full[group], facts_parity);
            facts_parity ^= 1;
            asm volatile("cp.async.wait_all;" ::: "memory");
#if CENTRED
            // A token whose integers are all the lowest is all zeros. Its sums, of floats, are not.
            const int lowest = -128 * 64 * chunks;
            for (int own = thread % 128; own < min(tokens - token, TOKENS); own += 128) {
                Grid& grid = shared.grids[group][own];
                if (grid.zero == -128 && grid.total == lowest) grid.step = 0.0f;
            }
#endif
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");  // every thread's grids are there
#endif
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++) {
                const int own = stripe + stripe_of(slab);
#if INTEGER
                const Facts& of = shared.facts[group][stripe_of(slab)];
                const float steps_of[2] = {of.step[row], of.step[row + 8]};
                [[maybe_unused]] const int zeros[2] = {-of.zero[row], -of.zero[row + 8]};
                const sum_t totals[2] = {-of.total[row], -of.total[row + 8]};
#endif
                auto scaled_sum = [&](int column, int i, sum_t sum) {  // of token 2 quarter or 2 quarter + 1 of a column; output g or g + 8
#if INTEGER
                    const Grid grid = shared.grids[group][8 * column + 2 * quarter + i % 2];
#if CENTRED
                    const float whole = sum + (float)grid.zero * totals[i / 2];
#else
                    const int whole = (sum >> (i / 2 ? HIGH_BITS : 0)) + grid.zero * totals[i / 2] + grid.total * zeros[i / 2];
#endif
                    return __fmul_rn(__fmul_rn((float)whole, grid.step), steps_of[i / 2]);
#else
                    return __fmul_rn(sum, steps_of[i / 2]);
#endif
                };
#if CORRECTED
                float corrected[TOKENS / 2];
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) corrected[i] = scaled_sum(i / 4, i % 4, sums[slab][i]);
                const int ranks = part_of(stripe).ranks;
#pragma unroll 1
                for (int rank_at = 0; rank_at < ranks; rank_at += RANKS) {
                    wait_for(&shared.full[stage], parity);
                    const u8* const here = ring + stage * STAGE_BYTES;
                    const u64 u = operand(here + warp / 4 * (64 * RANK_BYTES), RANK_BYTES), t_at = operand(here + U_BYTES, RANK_BYTES);
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                    for (int step = 0; step < RANKS / 16; step++) multiply_ranks(corrected, u + step * 32 / 16, t_at + step * 32 / 16);
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (rank_at) release(stage ? stage - 1 : STAGES - 1);
                    if (++stage == STAGES) { stage = 0; parity ^= 1; }
                }
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
                for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(corrected[i]) :: "memory");
                if (ranks) release(stage ? stage - 1 : STAGES - 1);
#endif
                const int output = own * 16 + row;
                const float bias_low = has_bias && output < outputs ? low_half(bias[output]) : 0.0f;
                const float bias_high = has_bias && output + 8 < outputs ? low_half(bias[output + 8]) : 0.0f;
                // A lane brings 8 outputs of one token of a piece to y. Units of 16 bytes lie so that no two are in each other's way.
                const int half = lane % 2, written = lane / 2, place = own * 16 + 8 * half;
                const u32 turned_row = address(shared.turned[warp]) + 128 * (lane / 8) + 16 * (lane % 8 ^ 4 * (lane / 8 % 2));
                const u8* const mine = shared.turned[warp] + 128 * (2 * (written / 8) + half) + 16 * (written % 8 ^ 4 * half);
                const int most = written < 8 * PIECE && place < outputs ? tokens - token - written : 0;
                unsigned short* to = y + (u64)(token + written) * outputs + place;
#pragma unroll
                for (int column = 0; column < COLUMNS; column += PIECE, to += 8 * PIECE * (u64)outputs) {
                    if (SPLIT > 1 && column % SPLIT != rank) continue;
                    asm volatile("" ::: "memory");  // grids stay in shared memory until they are used
                    u32 pairs[2 * PIECE];  // of tokens and outputs as above
#pragma unroll
                    for (int piece = 0; piece < PIECE; piece++) {
#if !CORRECTED
                        sum_t four[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) four[i] = sums[slab][4 * (column + piece) + i];
#endif
#if SPLIT > 1
#pragma unroll
                        for (int sender = 0; sender < SPLIT - 1; sender++)
#pragma unroll
                            for (int i = 0; i < 4; i++) four[i] += parts[sender * OWN_COLUMNS + column / SPLIT][thread][i];
#endif
                        float values[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
#if CORRECTED
                            values[i] = corrected[4 * (column + piece) + i];
#else
                            values[i] = scaled_sum(column + piece, i, four[i]);
#endif
                            values[i] = __fadd_rn(values[i], i < 2 ? bias_low : bias_high);
                        }
                        pairs[2 * piece] = half_pair(values[0], values[1]);
                        pairs[2 * piece + 1] = half_pair(values[2], values[3]);
                    }
                    __syncwarp();  // the piece before was read
                    store_turned(turned_row, pairs);
                    __syncwarp();
                    if (8 * column < most) *(Words*)to = *(const Words*)mine;
                }
            }
        }
    }
#if SPLIT > 1
    if (warp >= WARPS) {
        __syncwarp();
        cluster_arrive();  // with the consumers
        cluster_wait();
    }
#endif
    // If the inputs are split, a block has waited for all that others send to it, and may end before them.
#if SHARE > 1
    __syncwarp();
    cluster_arrive();  // no block ends while another still uses its memory
    cluster_wait();
#endif
}
