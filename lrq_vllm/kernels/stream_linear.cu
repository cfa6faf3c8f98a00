// y = x W^T for few tokens (8 * TILES at most): the weight is streamed once through shared memory, at the memory's speed.
//
// Twins: reference.quantize_per_token or quantize_static followed by reference.integer_linear (INTEGER), and
// reference.weight_only_linear. stream_linear.py compiles this file with the constants below and lays the weight out.
//
// The product is computed transposed, so that 16 outputs ("a stripe") are the rows of a tensor-core tile and 8 tokens its
// columns. A cluster of CLUSTER blocks takes every so-manieth stripe, TURNS at most. Its CLUSTER * WARPS multiplying warps share
// the inputs, CHUNKS chunks of 64 inputs each, and keep their part of x in registers for the whole kernel, as 8-bit integers if
// INTEGER. One more warp fills a ring of STAGES buffers with the weight, PIECE chunks for each multiplying warp to a buffer, by
// bulk copies that begin before x is quantized. Two more add up: over the warps, through buffers in shared memory, while those
// go on with the next stripe; then over the blocks, in the shared memory of one of them.
//
// While weights stream, any other load from global memory takes microseconds: what belongs to a stripe (its steps, zero-points
// and totals: `facts`) is therefore fetched for all turns at the start.
//
// Chunks that the weight does not have are multiplied all the same: whatever the ring holds there, x is 0.
//
// Constants: BITS (8, 4, 3), INTEGER, FLOAT16 (else bfloat16), X (what x is: 0 as it came; to be quantized 1 per token, 2 by the
// calibrated step; 3 quantized already), TILES, CHUNKS, PIECE, WARPS, CLUSTER, STAGES, TURNS, REDUCTIONS (buffers of sums),
// SHARED_BYTES.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

#define CHUNK_BYTES (BITS * 128)  // 16 outputs x 64 inputs
#define STAGE_BYTES (WARPS * PIECE * CHUNK_BYTES)
#define TOKENS (8 * TILES)
#define CHAINS (TILES == 1 ? 2 : 1)  // sums that do not wait for each other
#define OUTPUTS (128 * TILES)  // of one stripe
#define ADDERS 64  // threads that add up
#define FILLER (WARPS + ADDERS / 32)  // the warp that fills the ring
#define THREADS (32 * FILLER + 32)
#define LED ((TURNS + CLUSTER - 1) / CLUSTER)  // turns that one block of a cluster finishes

#if INTEGER
typedef int sum_t;
#define X_REGISTERS 4  // per chunk and tile
#else
typedef float sum_t;
#define X_REGISTERS 8
#endif

struct __align__(16) Words { u32 at[4]; };

struct __align__(16) Facts { float step[16]; int zero[16], total[16]; };

struct __align__(16) Grid { float step, inverse; int zero; };  // zero-point on the int8 grid

struct Shared {
    u64 full[STAGES], empty[STAGES], facts_full, sums_full[REDUCTIONS], sums_empty[REDUCTIONS], parts_full[LED];
    Facts facts[TURNS];
    Grid grid[TOKENS];
    sum_t totals[WARPS][TOKENS], total[TOKENS];  // of x, over this block's inputs
    float low[WARPS][TOKENS], high[WARPS][TOKENS];
    float block_low[CLUSTER][TOKENS], block_high[CLUSTER][TOKENS];
    sum_t parts[CLUSTER > 1 ? LED : 1][CLUSTER][CLUSTER > 1 ? OUTPUTS : 1];
    union {
        sum_t sums[REDUCTIONS][WARPS][TILES * 4][32];
        __align__(16) u8 quantized[WARPS][8][64];
    };
};
static_assert(STAGES * STAGE_BYTES + sizeof(Shared) <= SHARED_BYTES, "stream_linear.plan counts too little");

__device__ __forceinline__ u32 address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void wait_for(u64* barrier, u32 parity) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n bra again;\n finished:\n}"
        ::"r"(address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_in_block(u64* barrier, u32 block) {
    asm volatile(
        "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(address(barrier)), "r"(block) : "memory");
}

// As wait_for, and what other blocks wrote before they arrived may be read.
__device__ __forceinline__ void wait_for_blocks(u64* barrier) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra finished;\n bra again;\n finished:\n}"
        ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// `barrier` learns when the bytes are there.
__device__ __forceinline__ void fetch(void* here, const void* source, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(address(here)), "l"(source), "r"(bytes), "r"(address(barrier)), "l"(policy) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void store_in_block(void* here, u32 block, u32 value) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(here)), "r"(block));
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}

__device__ __forceinline__ float low_half(u32 pair) {
#if FLOAT16
    float value;
    asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %1;\n cvt.f32.f16 %0, low;\n}" : "=f"(value) : "r"(pair));
    return value;
#else
    return __uint_as_float(pair << 16);
#endif
}

__device__ __forceinline__ float high_half(u32 pair) {
#if FLOAT16
    return low_half(pair >> 16);
#else
    return __uint_as_float(pair & 0xffff0000u);
#endif
}

__device__ __forceinline__ unsigned short half_bits(float value) {
    unsigned short bits;
#if FLOAT16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ Words load_words(const void* from, bool inside) {
    const Words none = {{0, 0, 0, 0}};
    return inside ? *(const Words*)from : none;
}

// Two inputs, as bytes on the int8 grid: clamp(round(x / step) + zero, -128, 127), with IEEE division. The quotient by
// multiplication decides, except close to a border between two integers.
__device__ __forceinline__ u32 quantized_pair(u32 pair, const Grid& grid) {
    const float values[2] = {low_half(pair), high_half(pair)};
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 leaves no fraction bits
    float nearest[2], off[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float quotient = values[i] * grid.inverse;
#if X == 2
        quotient = fminf(fmaxf(quotient, -1024.0f), 1024.0f);
#endif
        nearest[i] = (quotient + magic) - magic;
        off[i] = fabsf(quotient - nearest[i]);
    }
    if (fmaxf(off[0], off[1]) > 0.4998f) {
#pragma unroll
        for (int i = 0; i < 2; i++) nearest[i] = rintf(fminf(fmaxf(__fdiv_rn(values[i], grid.step), -1024.0f), 1024.0f));
    }
    u32 bytes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) bytes[i] = min(max((int)nearest[i] + grid.zero, -128), 127);
    return __byte_perm(bytes[0], bytes[1], 0x0040);
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float value) {
    const int bits = __float_as_int(value);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits >= 0 ? bits : bits ^ 0x7fffffff); }

#if INTEGER
__device__ __forceinline__ void multiply(sum_t sums[4], const u32 w[4], const u32* x) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]));
}
#else
#if FLOAT16
#define FORMAT "f16"
#define MAGIC 0x64006400u  // 1024 | q is 1024 + q
#define MAGIC_VALUE 1024.0f
#else
#define FORMAT "bf16"
#define MAGIC 0x43004300u  // 128 | q is 128 + q
#define MAGIC_VALUE 128.0f
#endif
__device__ __forceinline__ void multiply(sum_t sums[4], const u32 w[4], const u32* x) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." FORMAT "." FORMAT ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]));
}

// Bits of a word that hold two values q, made floats: MAGIC_VALUE + q. The sums' share of MAGIC_VALUE is taken off in the end,
// with the zero-point's: both go with the total of x.
__device__ __forceinline__ u32 floats(u32 word, u32 mask) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(MAGIC));  // (word & mask) | MAGIC
    return result;
}
#endif

// One chunk: 16 outputs x 64 inputs, by all tokens.
__device__ __forceinline__ void multiply_chunk(
    sum_t sums[TILES][4], const u8* chunk, const u32 x[TILES][X_REGISTERS], int lane) {
#if INTEGER && BITS == 8
    const Words low = ((const Words*)chunk)[lane], high = ((const Words*)chunk)[32 + lane];
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const u32 w[4] = {low.at[2 * step], high.at[2 * step], low.at[2 * step + 1], high.at[2 * step + 1]};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], w, x[tile] + 2 * step);
    }
#elif INTEGER && BITS == 4
    const Words words = ((const Words*)chunk)[lane];
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const u32 low = words.at[step], high = words.at[2 + step], mask = 0x0f0f0f0fu;
        const u32 w[4] = {low & mask, high & mask, (low >> 4) & mask, (high >> 4) & mask};
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], w, x[tile] + 2 * step);
    }
#else
#if BITS == 4
    const Words words = ((const Words*)chunk)[lane];
#else
    const u32 word[3] = {((const u32*)chunk)[lane], ((const u32*)chunk)[32 + lane], ((const u32*)chunk)[64 + lane]};
    const u32 last = ((word[0] >> 15) & 0x00010001u) | ((word[1] >> 14) & 0x00020002u) | ((word[2] >> 13) & 0x00040004u);
#endif
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
#if BITS == 4
            w[i] = floats(words.at[step] >> (4 * i), 0x000f000fu);
#else
            const int place = 4 * step + i;
            w[i] = place == 15 ? last | MAGIC : floats(word[place / 5 > 2 ? 2 : place / 5] >> (3 * (place % 5)), 0x00070007u);
#endif
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], w, x[tile] + 2 * step);
    }
#endif
}

// Which output and token of a stripe an element of the reduced tile is.
__device__ __forceinline__ int output_of(int element) { return ((element >> 2) & 7) + 8 * ((element >> 6) & 1); }
__device__ __forceinline__ int token_of(int element) { return 8 * (element >> 7) + 2 * (element & 3) + ((element >> 5) & 1); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1) stream_linear(
    const u8* x, const u8* weight, const Facts* facts, const float* x_step, const u8* x_zero, const unsigned short* bias,
    unsigned short* y, int has_bias, int tokens, int outputs, int inputs, int x_stride, int chunks, int stripes) {
    extern __shared__ __align__(128) u8 memory[];
    u8* const ring = memory;
    Shared& shared = *(Shared*)(memory + STAGES * STAGE_BYTES);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = lane / 4, quarter = lane % 4;
    const int rank = blockIdx.x % CLUSTER, group = blockIdx.x / CLUSTER, groups = gridDim.x / CLUSTER;
    const int turns = (stripes - group + groups - 1) / groups;
    // This block's chunks, and in how many pieces they come; a warp's chunks are PIECE neighbours of each piece.
    const int first = rank * WARPS * CHUNKS, here = min(max(chunks - first, 0), WARPS * CHUNKS);
    const int pieces = (here + WARPS * PIECE - 1) / (WARPS * PIECE);
    auto chunk_at = [&](int chunk) { return first + (chunk / PIECE * WARPS + warp) * PIECE + chunk % PIECE; };

    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    int filled_turn = 0, filled_piece = 0;  // what the ring is filled with next
    auto fill = [&](int stage) {
        const int begin = filled_piece * WARPS * PIECE, bytes = min(here - begin, WARPS * PIECE) * CHUNK_BYTES;
        const u64 stripe = group + filled_turn * groups;
        expect(&shared.full[stage], bytes);
        fetch(ring + stage * STAGE_BYTES, weight + (stripe * chunks + first + begin) * CHUNK_BYTES, bytes, &shared.full[stage], policy);
        if (++filled_piece == pieces) { filled_piece = 0; filled_turn++; }
    };
    int filled = 0;
    if (warp == FILLER && lane == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init(&shared.full[stage], 1);
            init(&shared.empty[stage], WARPS);
        }
        init(&shared.facts_full, 1);
        for (int buffer = 0; buffer < REDUCTIONS; buffer++) {
            init(&shared.sums_full[buffer], WARPS);
            init(&shared.sums_empty[buffer], ADDERS / 32);
        }
        for (int led = 0; led < LED; led++) init(&shared.parts_full[led], CLUSTER * ADDERS / 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (; filled < min(STAGES, turns * pieces); filled++) fill(filled);
        expect(&shared.facts_full, turns * sizeof(Facts));
        for (int turn = 0; turn < turns; turn++)
            fetch(&shared.facts[turn], facts + group + turn * groups, sizeof(Facts), &shared.facts_full, policy);
    }

    // x into registers: lane (row, quarter) holds token `row` of each tile, inputs 16 * quarter to 16 * quarter + 15 of a chunk.
    u32 xs[CHUNKS][TILES][X_REGISTERS];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // the next kernel may begin to do all that was done so far
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for the kernel that makes x
#if X == 0 || X == 3
#define X_BYTES (X == 3 ? 1 : 2)
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int token = tile * 8 + row, input = chunk_at(chunk) * 64 + quarter * 16;
            const u8* const mine = x + ((u64)token * x_stride + input) * X_BYTES;
#pragma unroll
            for (int part = 0; part < X_BYTES; part++) {
                const Words words = load_words(mine + 16 * part, warp < WARPS && token < tokens && input < inputs);
#pragma unroll
                for (int i = 0; i < 4; i++) xs[chunk][tile][4 * part + i] = words.at[i];
            }
        }
    }
#if X == 3
    if (thread < TOKENS) {
        const bool inside = thread < tokens;
        shared.grid[thread] = {inside ? x_step[thread] : 0.0f, 0.0f, inside ? ((const int*)x_zero)[thread] : 0};
    }
#endif
#else
    // A warp reads its inputs of one token after the other, two neighbours to a lane, and hands them on as bytes.
    auto load_pair = [&](int tile, int token, int chunk) -> u32 {
        const int input = chunk_at(chunk) * 64 + 2 * lane;
        const bool inside = warp < WARPS && tile * 8 + token < tokens && input < inputs;
        return inside ? *(const u32*)(x + ((u64)(tile * 8 + token) * x_stride + input) * 2) : 0;
    };
#define HELD (TILES * CHUNKS <= 8)  // whether pairs stay in registers until they are quantized
#if HELD
    u32 pairs[TILES][8][CHUNKS];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int token = 0; token < 8; token++)
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) pairs[tile][token][chunk] = load_pair(tile, token, chunk);
#endif
#if HELD
#define PAIR(tile, token, chunk) pairs[tile][token][chunk]
#else
#define PAIR(tile, token, chunk) load_pair(tile, token, chunk)
#endif
#if X == 2
    if (thread < TOKENS) {
        shared.grid[thread] = {*x_step, __frcp_rn(*x_step), *x_zero - 128};
    }
    __syncthreads();
#else
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int token = 0; token < 8; token++)
            if (tile * 8 + token < tokens) {
                float low = 0.0f, high = 0.0f;
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    const u32 pair = PAIR(tile, token, chunk);
                    const float a = low_half(pair), b = high_half(pair);
                    low = fminf(low, fminf(a, b));
                    high = fmaxf(high, fmaxf(a, b));
                }
                low = from_ordered(__reduce_min_sync(0xffffffffu, ordered(low)));
                high = from_ordered(__reduce_max_sync(0xffffffffu, ordered(high)));
                if (lane == 0 && warp < WARPS) {
                    shared.low[warp][tile * 8 + token] = low;
                    shared.high[warp][tile * 8 + token] = high;
                }
            }
    __syncthreads();
    float low = 0.0f, high = 0.0f;
    if (thread < tokens) {
        for (int other = 0; other < WARPS; other++) {
            low = fminf(low, shared.low[other][thread]);
            high = fmaxf(high, shared.high[other][thread]);
        }
    }
#if CLUSTER > 1
    cluster_arrive();  // every block of the cluster runs: its memory may be written
    cluster_wait();
    if (thread < tokens) {
        for (int block = 0; block < CLUSTER; block++) {
            store_in_block(&shared.block_low[rank][thread], block, __float_as_uint(low));
            store_in_block(&shared.block_high[rank][thread], block, __float_as_uint(high));
        }
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (thread < tokens) {
        for (int block = 0; block < CLUSTER; block++) {
            low = fminf(low, shared.block_low[block][thread]);
            high = fmaxf(high, shared.block_high[block][thread]);
        }
    }
#endif
    if (thread < tokens) {
        float step = __fdiv_rn(high - low, 255.0f);
        step = step > 0.0f ? step : 1.0f;
        const float zero = fminf(fmaxf(rintf(__fdiv_rn(-low, step)), 0.0f), 255.0f);
        shared.grid[thread] = {step, __frcp_rn(step), (int)zero - 128};
    }
    __syncthreads();
#endif
    if (warp < WARPS) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                __syncwarp();
#pragma unroll
                for (int token = 0; token < 8; token++)
                    if (tile * 8 + token < tokens) {
                        const u32 bytes = quantized_pair(PAIR(tile, token, chunk), shared.grid[tile * 8 + token]);
                        *(unsigned short*)&shared.quantized[warp][token][2 * lane] = bytes;
                    }
                __syncwarp();
                const bool inside = tile * 8 + row < tokens && chunk_at(chunk) * 64 + quarter * 16 < inputs;
                const Words words = load_words(&shared.quantized[warp][row][16 * quarter], inside);
#pragma unroll
                for (int i = 0; i < 4; i++) xs[chunk][tile][i] = words.at[i];
            }
    }
#endif
    if (warp < WARPS) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            sum_t total = 0;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
                for (int i = 0; i < X_REGISTERS; i++)
#if INTEGER
                    total = __dp4a((int)xs[chunk][tile][i], 0x01010101, total);
#else
                    total += low_half(xs[chunk][tile][i]) + high_half(xs[chunk][tile][i]);
#endif
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (quarter == 0) shared.totals[warp][tile * 8 + row] = total;
        }
    }
    __syncthreads();
    if (thread < TOKENS) {
        sum_t total = 0;
        for (int other = 0; other < WARPS; other++) total += shared.totals[other][thread];
        shared.total[thread] = total;
    }
    __syncthreads();
#if CLUSTER > 1
    __syncwarp();
    cluster_arrive();  // every block of the cluster runs, and is done with its first sums: its memory may be written
    cluster_wait();
#endif

    wait_for(&shared.facts_full, 0);

    if (warp < WARPS) {
        int stage = 0, parity = 0;
        for (int turn = 0; turn < turns; turn++) {
            sum_t sums[CHAINS][TILES][4];
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++)
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[chain][tile][i] = 0;
#pragma unroll
            for (int piece = 0; piece < CHUNKS / PIECE; piece++) {
                if (piece >= pieces) continue;
                wait_for(&shared.full[stage], parity);
                const u8* const mine = ring + stage * STAGE_BYTES + warp * (PIECE * CHUNK_BYTES);
#pragma unroll
                for (int chunk = 0; chunk < PIECE; chunk++)
                    multiply_chunk(sums[chunk % CHAINS], mine + chunk * CHUNK_BYTES, xs[piece * PIECE + chunk], lane);
                __syncwarp();
                if (lane == 0) arrive(&shared.empty[stage]);
                if (++stage == STAGES) { stage = 0; parity ^= 1; }
            }
            const int buffer = turn % REDUCTIONS;
            if (turn >= REDUCTIONS) wait_for(&shared.sums_empty[buffer], turn / REDUCTIONS - 1 & 1);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum_t sum = sums[0][tile][i];
                    if (CHAINS == 2) sum += sums[CHAINS - 1][tile][i];
                    shared.sums[buffer][warp][tile * 4 + i][lane] = sum;
                }
            __syncwarp();
            if (lane == 0) arrive(&shared.sums_full[buffer]);
        }
    } else if (warp < FILLER) {
        const int adder = thread - 32 * WARPS;
        auto finish = [&](sum_t sum, int element, int turn) {
            const int stripe = group + turn * groups, output = output_of(element), n = stripe * 16 + output;
            const int token = token_of(element);
            if (token >= tokens || n >= outputs) return;
            const Facts& of = shared.facts[turn];
#if INTEGER
            sum -= shared.grid[token].zero * of.total[output];
            float value = __fmul_rn(__fmul_rn((float)sum, shared.grid[token].step), of.step[output]);
#else
            float value = __fmul_rn(sum, of.step[output]);
#endif
            if (has_bias) value = __fadd_rn(value, low_half(bias[n]));
            y[(u64)token * outputs + n] = half_bits(value);
        };
        for (int turn = 0; turn < turns; turn++) {
            const int buffer = turn % REDUCTIONS;
            wait_for(&shared.sums_full[buffer], turn / REDUCTIONS & 1);
            sum_t sums[OUTPUTS / ADDERS];
#pragma unroll
            for (int i = 0; i < OUTPUTS / ADDERS; i++) {
                const int element = i * ADDERS + adder;
                sums[i] = 0;
#pragma unroll
                for (int other = 0; other < WARPS; other++) sums[i] += shared.sums[buffer][other][element / 32][element % 32];
            }
            __syncwarp();
            if (lane == 0) arrive(&shared.sums_empty[buffer]);
#pragma unroll
            for (int i = 0; i < OUTPUTS / ADDERS; i++) {
                const int element = i * ADDERS + adder;
                const int zero = shared.facts[turn].zero[output_of(element)];
#if INTEGER
                sums[i] -= zero * shared.total[token_of(element)];
#else
                sums[i] -= (MAGIC_VALUE + zero) * shared.total[token_of(element)];
#endif
#if CLUSTER == 1
                finish(sums[i], element, turn);
#else
                store_in_block(&shared.parts[turn / CLUSTER][rank][element], turn % CLUSTER, *(u32*)&sums[i]);
#endif
            }
#if CLUSTER > 1
            __syncwarp();
            if (lane == 0) arrive_in_block(&shared.parts_full[turn / CLUSTER], turn % CLUSTER);
#endif
        }
#if CLUSTER > 1
        // The blocks of a cluster finish its stripes in turn.
        for (int turn = rank; turn < turns; turn += CLUSTER) {
            wait_for_blocks(&shared.parts_full[turn / CLUSTER]);
#pragma unroll
            for (int i = 0; i < OUTPUTS / ADDERS; i++) {
                const int element = i * ADDERS + adder;
                sum_t sum = 0;
#pragma unroll
                for (int block = 0; block < CLUSTER; block++) sum += shared.parts[turn / CLUSTER][block][element];
                finish(sum, element, turn);
            }
        }
#endif
    } else if (lane == 0) {
        for (; filled < turns * pieces; filled++) {
            const int stage = filled % STAGES;
            wait_for(&shared.empty[stage], filled / STAGES - 1 & 1);
            fill(stage);
        }
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_arrive();  // no block ends while another may still write to it
    cluster_wait();
#endif
}
