// A chunk of the weight (arranged_weight.py): from shared memory to the operands of tensor-core steps.
//
// Constants: BITS (8, 4, 3), INTEGER (whether it meets 8-bit activations), FLOAT16. Weights that meet 16-bit activations become
// MAGIC_VALUE + q, which takes one instruction.

#define CHUNK_BYTES (BITS * 128)  // 16 outputs x 64 inputs
#if INTEGER
typedef int sum_t;
#define STEPS 2  // of a tensor core, for a chunk
#define X_REGISTERS 4  // of a chunk of x, for a lane
#else
typedef float sum_t;
#define STEPS 4
#define X_REGISTERS 8
#if FLOAT16
#define FORMAT "f16"
#define MAGIC 0x64006400u  // 1024 | q is 1024 + q
#define MAGIC_VALUE 1024.0f
#else
#define FORMAT "bf16"
#define MAGIC 0x43004300u  // 128 | q is 128 + q
#define MAGIC_VALUE 128.0f
#endif
#endif

// Steps, zero-points and totals of a stripe's outputs.
struct __align__(16) Facts { float step[16]; int zero[16], total[16]; };

struct Chunk { u32 at[BITS]; };  // what a lane holds of it

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
    return loaded;
}

#if !INTEGER
__device__ __forceinline__ u32 floats(u32 word, u32 mask) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(MAGIC));  // (word & mask) | MAGIC
    return result;
}
#endif

// The left operand of one tensor-core step: outputs g, g + 8, g, g + 8 of lane 4 g + t; the first two with earlier inputs.
__device__ __forceinline__ void operands(u32 w[4], const Chunk& chunk, int step) {
#if INTEGER && BITS == 8
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = chunk.at[4 * (i % 2) + 2 * step + i / 2];
#elif INTEGER
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = (chunk.at[2 * (i % 2) + step] >> (4 * (i / 2))) & 0x0f0f0f0fu;
#elif BITS == 4
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = floats(chunk.at[step] >> (4 * i), 0x000f000fu);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int place = 4 * step + i;
        w[i] = place < 15 ? floats(chunk.at[place < 15 ? place / 5 : 0] >> (3 * (place % 5)), 0x00070007u)
                          : ((chunk.at[0] >> 15) & 0x00010001u) | ((chunk.at[1] >> 14) & 0x00020002u)
                                | ((chunk.at[2] >> 13) & 0x00040004u) | MAGIC;
    }
#endif
}
