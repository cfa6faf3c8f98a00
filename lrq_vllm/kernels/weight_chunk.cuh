// A chunk of the weight (arranged_weight.py): from shared memory to the operands of tensor-core steps.
//
// Constants: BITS (8, 4, 3), INTEGER (whether it meets 8-bit activations), FLOAT16, GROUPED (whether steps are per group of inputs),
// CENTRED (whether operands, which meet integers then, are q - zero_point of the group).
//
// Weights of 4 and 3 bits become operands by masks alone, and one shift for two of them. A whole number below 256 in the lowest
// bits of a 16-bit float is that number times UNIT, the smallest float above 0: this holds among the subnormal floats and right
// above them. So the operands are q * UNIT for outputs g, and q * UNIT * 2^HIGH_BITS for outputs g + 8, whose bits stand higher.

#define INTEGER_BYTES (BITS * 128)  // of 16 outputs x 64 inputs
#define CHUNK_BYTES (INTEGER_BYTES + (GROUPED ? 64 : 0))
#if INTEGER
typedef int product_t;  // what tensor cores add up
#define STEPS 2  // of a tensor core, for a chunk
#define X_REGISTERS 4  // of a chunk of x, for a lane
#else
typedef float product_t;
#define STEPS 4
#define X_REGISTERS 8
#define UNIT (FLOAT16 ? 0x1p-24f : 0x1p-133f)
#endif
#if GROUPED
typedef float sum_t;  // over all inputs
#else
typedef product_t sum_t;
#endif
#if BITS == 8 || CENTRED
#define WEIGHT_TYPE "s8"
#define HIGH_BITS 0
#else
#define WEIGHT_TYPE "u8"
#define HIGH_BITS BITS
#endif

// Steps, zero-points and totals of a stripe's outputs. With groups, totals are in units of the step, and no whole numbers.
struct __align__(16) Facts {
    float step[16];
    int zero[16];
    sum_t total[16];
};

// Of the group that a chunk belongs to, for an output: step relative to the channel's (1 at most, whatever may stand behind the
// last chunk), and zero-point.
struct Group { float step; u32 zero; };

// What a lane holds of it.
struct Chunk {
    u32 at[BITS];
#if GROUPED
    Group groups[2];  // of outputs g and g + 8
#endif
};

__device__ __forceinline__ Chunk load_chunk(const u8* chunk, int lane) {
    Chunk loaded;
#if BITS == 8
#pragma unroll
    for (int half = 0; half < 2; half++) {  // four 8 x 8 matrices of 16 bits: a lane says where one row of them is
        const u32 row = address(chunk) + 512 * half + 64 * (lane % 8) + 16 * (lane / 8 ^ lane / 2 % 4);
        u32* const at = loaded.at + 4 * half;
        asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3]) : "r"(row) : "memory");
    }
#elif BITS == 4
    const Words words = ((const Words*)chunk)[lane];
#pragma unroll
    for (int i = 0; i < 4; i++) loaded.at[i] = words.at[i];
#else
#pragma unroll
    for (int i = 0; i < 3; i++) loaded.at[i] = ((const u32*)chunk)[32 * i + lane];
#endif
#if GROUPED
#pragma unroll
    for (int high = 0; high < 2; high++) {
        const u32 word = ((const u32*)(chunk + INTEGER_BYTES))[lane / 4 + 8 * high];
        loaded.groups[high] = {fminf(fabsf(__uint_as_float(word & ~15u)), 1.0f), word & 15};
    }
#endif
    return loaded;
}

// The left operand of one tensor-core step: outputs g, g + 8, g, g + 8 of lane 4 g + t; the first two with earlier inputs.
__device__ __forceinline__ void operands(u32 w[4], const Chunk& chunk, int step) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int high = i % 2, late = i / 2;
#if BITS == 8
        w[i] = chunk.at[4 * high + 2 * step + late];
#elif CENTRED
        const u32 four = (chunk.at[2 * step + late] >> (high ? 4 : 0)) & 0x0f0f0f0fu;
        w[i] = ((four | 0x80808080u) - chunk.groups[high].zero * 0x01010101u) ^ 0x80808080u;  // no byte borrows from the next one
#elif INTEGER
        w[i] = chunk.at[2 * step + late] & (high ? 0xf0f0f0f0u : 0x0f0f0f0fu);
#elif BITS == 4
        w[i] = (chunk.at[step] >> (8 * late)) & (high ? 0x00f000f0u : 0x000f000fu);
#else
        const u32 mask = high ? 0x00380038u : 0x00070007u;
        if (step < 3) w[i] = (chunk.at[step] >> (6 * late)) & mask;
        else if (late) w[i] = (chunk.at[1 + high] >> (high ? 9 : 12)) & mask;
        else if (!high) w[i] = (chunk.at[0] >> 12) & mask;
        else
            w[i] = ((chunk.at[0] >> 12) & 0x00080008u) | ((chunk.at[1] >> 11) & 0x00100010u) | ((chunk.at[2] >> 10) & 0x00200020u);
#endif
    }
}
