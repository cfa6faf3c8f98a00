// y = x W^T for few tokens (8 * TILES at most): the weight is streamed once through shared memory, at the memory's speed.
//
// Twins: reference.quantize_input followed by reference.integer_linear (INTEGER), and reference.weight_only_linear. stream_linear.py compiles this file with the constants below and lays the weight out.
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
// Where groups meet integers, a warp's sums over a chunk are exact: sum_k (q_w - z_w) (q_x - z_x) is
// sum_k q_w q_x - z_x sum_k q_w - z_w sum_k (q_x - z_x), and the weights are summed up as products with ones. It begins with BIAS, so
// that its bits are those of the float 1.5 * 2^23 + sum. These times the group's step are what warps add up.
//
// Chunks that the weight does not have are multiplied all the same: whatever the ring holds there, x is 0. If INTEGER_GROUPS, so are
// their steps.
//
// Constants: BITS (8, 4, 3), INTEGER, FLOAT16 (else bfloat16), GROUPED, KIND (of x, see hopper.cuh), TILES, CHUNKS, PIECE,
// WARPS, CLUSTER, STAGES, TURNS, REDUCTIONS (buffers of sums), SHARED_BYTES. hopper.cuh and weight_chunk.cuh come before.

#define STAGE_BYTES (WARPS * PIECE * CHUNK_BYTES)
#define TOKENS (8 * TILES)
#define CHAINS (TILES == 1 ? 2 : 1)  // sums that do not wait for each other
#define OUTPUTS (128 * TILES)  // of one stripe
#define ADDERS 64  // threads that add up
#define FILLER (WARPS + ADDERS / 32)  // the warp that fills the ring
#define THREADS (32 * FILLER + 32)
#define QUANTIZED_HERE 4  // tokens at most
#define LED ((TURNS + CLUSTER - 1) / CLUSTER)  // turns that one block of a cluster finishes
#define INTEGER_GROUPS (INTEGER && GROUPED)
#if INTEGER_GROUPS
#define BIAS 0x4b400000
#else
#define BIAS 0
#endif
#define X_UNIT (FLOAT16 ? 1.0f : 0x1p64f)  // times which x is multiplied

struct Shared {
    u64 full[STAGES], empty[STAGES], facts_full, sums_full[REDUCTIONS], sums_empty[REDUCTIONS], ends_full, parts_full[LED];
    Facts facts[TURNS];
    Grid grid[TOKENS];
    sum_t totals[WARPS][TOKENS], total[TOKENS];  // of x, over this block's inputs
    float low[WARPS][TOKENS], high[WARPS][TOKENS];
    float ends[CLUSTER][2][TOKENS];  // low and high of the blocks
    sum_t parts[CLUSTER > 1 ? LED : 1][CLUSTER][CLUSTER > 1 ? OUTPUTS : 1];
    sum_t sums[REDUCTIONS][WARPS][TILES * 4][32];
#if KIND != AS_IT_IS && KIND != QUANTIZED
    __align__(16) u8 quantized[WARPS][QUANTIZED_HERE][64];
#endif
};
static_assert(KIND == AS_IT_IS || KIND == QUANTIZED || TILES == 1);
static_assert(STAGES * STAGE_BYTES + sizeof(Shared) <= SHARED_BYTES, "stream_linear.plan counts too little");

// Two neighbouring registers of x meet 16 outputs of the weight.
__device__ __forceinline__ void multiply(product_t sums[4], const u32 w[4], const u32* x) {
#if INTEGER
    asm("mma.sync.aligned.m16n8k32.row.col.s32." WEIGHT_TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]));
#else
    multiply_floats(sums, w, x);
#endif
}

// One chunk: 16 outputs x 64 inputs, by all tokens. w_totals: the weights themselves are added to it, if INTEGER_GROUPS.
__device__ __forceinline__ void multiply_chunk(
    product_t sums[TILES][4], const Chunk& chunk, const u32 x[TILES][X_REGISTERS], [[maybe_unused]] product_t* w_totals = nullptr) {
#if INTEGER_GROUPS
    const u32 ones[2] = {0x01010101u, 0x01010101u};
#endif
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 w[4];
        operands(w, chunk, step);
#if INTEGER_GROUPS
        multiply(w_totals, w, ones);
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], w, x[tile] + 2 * step);
    }
}

#if GROUPED
// The same with the step and the zero-point of the chunk's group. totals: of x over the chunk, for this lane's two tokens; of
// x - x_zeros if INTEGER_GROUPS.
__device__ __forceinline__ void multiply_group(
    sum_t sums[TILES][4], const Chunk& chunk, const u32 x[TILES][X_REGISTERS], const product_t totals[TILES][2],
    [[maybe_unused]] const int x_zeros[TILES][2]) {
    product_t products[TILES][4], w_totals[4] = {};
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) products[i / 4][i % 4] = BIAS;
    multiply_chunk(products, chunk, x, w_totals);
#pragma unroll
    for (int high = 0; high < 2; high++) {
        const Group& group = chunk.groups[high];
        const int unit = high ? 1 << HIGH_BITS : 1;
#if INTEGER_GROUPS
        const float step = group.step / unit;
        const int zero = group.zero * unit;
#else
        const float step = group.step, zero = (float)group.zero * (UNIT * X_UNIT * unit);
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                product_t product = products[tile][2 * high + i] - zero * totals[tile][i];
#if INTEGER_GROUPS
                product -= x_zeros[tile][i] * w_totals[2 * high];
                sums[tile][2 * high + i] += step * (__int_as_float(product) - __int_as_float(BIAS));
#else
                sums[tile][2 * high + i] += step * product;
#endif
            }
    }
}
#endif

// Lanes that differ in the bit `other` exchange one word each: the lower one gives its second.
__device__ __forceinline__ void exchange(u32& first, u32& second, int other, int lane) {
    const bool upper = lane & other;
    const u32 received = __shfl_xor_sync(0xffffffffu, upper ? first : second, other);
    first = upper ? received : first;
    second = upper ? second : received;
}

// Of four lanes with four words each: lane i gets word i of each lane.
__device__ __forceinline__ void transpose(u32 words[4], int lane) {
    exchange(words[0], words[2], 2, lane);
    exchange(words[1], words[3], 2, lane);
    exchange(words[0], words[1], 1, lane);
    exchange(words[2], words[3], 1, lane);
}

// Over the lanes of a token.
__device__ __forceinline__ sum_t over_quarters(sum_t value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Which output and token of a stripe an element of the reduced tile is.
__device__ __forceinline__ int output_of(int element) { return ((element >> 2) & 7) + 8 * ((element >> 6) & 1); }
__device__ __forceinline__ int token_of(int element) { return 8 * (element >> 7) + 2 * (element & 3) + ((element >> 5) & 1); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1) stream_linear(
    const u8* x, const u8* weight, const Facts* facts, const float* x_step, const u8* x_zero, const unsigned short* bias,
    unsigned short* y, int x_kind, int has_bias, int tokens, int outputs, int inputs, int x_stride, int chunks, int stripes) {
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
        fetch_hinted(ring + stage * STAGE_BYTES, weight + (stripe * chunks + first + begin) * CHUNK_BYTES, bytes, &shared.full[stage], policy);
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
        init(&shared.ends_full, 1);
        for (int led = 0; led < LED; led++) init(&shared.parts_full[led], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        fill(filled++);
        expect(&shared.facts_full, turns * sizeof(Facts));
        for (int turn = 0; turn < turns; turn++)
            fetch_hinted(&shared.facts[turn], facts + group + turn * groups, sizeof(Facts), &shared.facts_full, policy);
        for (; filled < min(STAGES, turns * pieces); filled++) fill(filled);
#if CLUSTER > 1 && OWN_GRIDS
        expect(&shared.ends_full, CLUSTER * tokens * 2 * sizeof(float));
#endif
#if CLUSTER > 1
        for (int led = 0; led < LED; led++) expect(&shared.parts_full[led], CLUSTER * OUTPUTS * sizeof(sum_t));
#endif
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_arrive();
#endif

    // x into registers: lane (row, quarter) holds token `row` of each tile and the same inputs of a chunk as of the weight.
    u32 xs[CHUNKS][TILES][X_REGISTERS];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // the next kernel may begin to do all that was done so far
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for the kernel that makes x
#if KIND == AS_IT_IS
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int token = tile * 8 + row, input = chunk_at(chunk) * 64 + quarter * 16;
            const u8* const mine = x + ((u64)token * x_stride + input) * 2;
            const bool inside = warp < WARPS && token < tokens && input < inputs;
            Words even = load_words(mine, inside), odd = load_words(mine + 16, inside);
            transpose(even.at, lane);
            transpose(odd.at, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                xs[chunk][tile][2 * i] = even.at[i];
                xs[chunk][tile][2 * i + 1] = odd.at[i];
            }
        }
    }
#elif KIND == QUANTIZED
    // Before x, whose words are waited for: these loads would take as long again after them.
    Grid mine = {0.0f, 0.0f, 0, 0};
    if (thread < tokens) {
        mine.step = x_step[own_step(x_kind, thread)];
        mine.zero = x_kind == PER_TOKEN ? ((const int*)x_zero)[thread] : common_zero(x_kind, x_zero);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int token = tile * 8 + row, input = chunk_at(chunk) * 64 + quarter * 16;
            Words words = load_words(x + (u64)token * x_stride + input, warp < WARPS && token < tokens && input < inputs);
            transpose(words.at, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) xs[chunk][tile][i] = words.at[i];
        }
    }
    if (thread < TOKENS) shared.grid[thread] = mine;
#else
    // A warp reads its inputs of one token after the other, two neighbours to a lane, and hands them on as bytes.
    u32 pairs[QUANTIZED_HERE][CHUNKS];
#pragma unroll
    for (int token = 0; token < QUANTIZED_HERE; token++)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int input = chunk_at(chunk) * 64 + 2 * lane;
            const bool inside = warp < WARPS && token < tokens && input < inputs;
            pairs[token][chunk] = inside ? *(const u32*)(x + ((u64)token * x_stride + input) * 2) : 0;
        }
#if KIND == STATIC
    if (thread < tokens) {
        shared.grid[thread] = {*x_step, __frcp_rn(*x_step), *x_zero - 128, 0};
    }
#else
#pragma unroll
    for (int token = 0; token < QUANTIZED_HERE; token++)
        if (token < tokens) {
            float low = 0.0f, high = 0.0f;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const float a = low_half(pairs[token][chunk]), b = high_half(pairs[token][chunk]);
                low = fminf(low, fminf(a, b));
                high = fmaxf(high, fmaxf(a, b));
            }
            low = from_ordered(__reduce_min_sync(0xffffffffu, ordered(low)));
            high = from_ordered(__reduce_max_sync(0xffffffffu, ordered(high)));
            if (lane == 0 && warp < WARPS) {
                shared.low[warp][token] = low;
                shared.high[warp][token] = high;
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
    cluster_wait();  // every block of the cluster runs: its memory may be written
    if (thread < tokens) {
        for (int block = 0; block < CLUSTER; block++) {
            send(&shared.ends[rank][0][thread], block, __float_as_uint(low), &shared.ends_full);
            send(&shared.ends[rank][1][thread], block, __float_as_uint(high), &shared.ends_full);
        }
        wait_for_blocks(&shared.ends_full);
        for (int block = 0; block < CLUSTER; block++) {
            low = fminf(low, shared.ends[block][0][thread]);
            high = fmaxf(high, shared.ends[block][1][thread]);
        }
    }
#endif
    if (thread < tokens) shared.grid[thread] = own_grid(low, high, x_step);
#endif
#endif
    __syncthreads();  // barriers are initialized, and grids known if the inputs are quantized here

#if GROUPED
    int x_zeros[TILES][2];  // of this lane's tokens
    product_t chunk_totals[CHUNKS][TILES][2];
#endif
    if (warp < WARPS) {
#if KIND != AS_IT_IS && KIND != QUANTIZED
        Grid grids[QUANTIZED_HERE];
#pragma unroll
        for (int token = 0; token < QUANTIZED_HERE; token++) grids[token] = shared.grid[min(token, tokens - 1)];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            __syncwarp();
#pragma unroll
            for (int token = 0; token < QUANTIZED_HERE; token++)
                if (token < tokens)
                    *(unsigned short*)&shared.quantized[warp][token][2 * lane] = quantized_pair(pairs[token][chunk], grids[token]);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool inside = row < tokens && chunk_at(chunk) * 64 + i * 16 < inputs;
                xs[chunk][0][i] = inside ? *(const u32*)&shared.quantized[warp][row][16 * i + 4 * quarter] : 0;
            }
        }
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            product_t total = 0;
#if INTEGER_GROUPS
#pragma unroll
            for (int i = 0; i < 2; i++) x_zeros[tile][i] = shared.grid[tile * 8 + 2 * quarter + i].zero;
#endif
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
#if GROUPED
                total = 0;
#endif
#pragma unroll
                for (int i = 0; i < X_REGISTERS; i++)
#if INTEGER
                    total = __dp4a((int)xs[chunk][tile][i], 0x01010101, total);
#else
                    total += low_half(xs[chunk][tile][i]) + high_half(xs[chunk][tile][i]);
#endif
#if GROUPED
                total = over_quarters(total);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    chunk_totals[chunk][tile][i] = __shfl_sync(0xffffffffu, total, 4 * (2 * quarter + i));
#if INTEGER
                    chunk_totals[chunk][tile][i] -= 64 * x_zeros[tile][i];
#endif
                }
#endif
            }
#if !GROUPED
            total = over_quarters(total);
            if (quarter == 0) shared.totals[warp][tile * 8 + row] = total;
#endif
        }
        asm volatile("bar.arrive 1, %0;" ::"n"(32 * WARPS + ADDERS) : "memory");
#if !INTEGER && !FLOAT16
        // Sums of products with UNIT would be subnormal.
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < X_REGISTERS; i++)
                    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(xs[chunk][tile][i]) : "r"(0x5f805f80u));  // by X_UNIT
#endif
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
                for (int chunk = 0; chunk < PIECE; chunk++) {
                    const int at = piece * PIECE + chunk;
                    Chunk loaded = load_chunk(mine + chunk * CHUNK_BYTES, lane);
#if INTEGER_GROUPS
                    if (chunk_at(at) >= chunks) loaded.groups[0].step = loaded.groups[1].step = 0.0f;
#endif
#if GROUPED
                    multiply_group(sums[chunk % CHAINS], loaded, xs[at], chunk_totals[at], x_zeros);
#else
                    multiply_chunk(sums[chunk % CHAINS], loaded, xs[at]);
#endif
                }
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
        asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS + ADDERS) : "memory");
        if (!GROUPED && adder < TOKENS) {
            sum_t total = 0;
            for (int other = 0; other < WARPS; other++) total += shared.totals[other][adder];
            shared.total[adder] = total;
        }
        asm volatile("bar.sync 2, %0;" ::"n"(ADDERS) : "memory");
        wait_for(&shared.facts_full, 0);
#if CLUSTER > 1 && !OWN_GRIDS
        cluster_wait();  // every block of the cluster runs: its memory may be written
#endif
        auto finish = [&](sum_t sum, int element, int turn) {
            const int stripe = group + turn * groups, output = output_of(element), n = stripe * 16 + output;
            const int token = token_of(element);
            if (token >= tokens || n >= outputs) return;
            const Facts& of = shared.facts[turn];
#if INTEGER
            if (!GROUPED) sum -= shared.grid[token].zero * of.total[output];
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
                [[maybe_unused]] const int high = i % 2;  // whether it is one of the outputs g + 8
#if INTEGER && !GROUPED
                sums[i] >>= high ? HIGH_BITS : 0;
#elif !INTEGER
                sums[i] *= 1.0f / (UNIT * X_UNIT) / (high ? 1 << HIGH_BITS : 1);
#endif
                if (!GROUPED) sums[i] -= zero * shared.total[token_of(element)];
#if CLUSTER == 1
                finish(sums[i], element, turn);
#else
                send(&shared.parts[turn / CLUSTER][rank][element], turn % CLUSTER, *(u32*)&sums[i], &shared.parts_full[turn / CLUSTER]);
#endif
            }
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
    // A block has waited for all that others send to it: it may end before them.
}
