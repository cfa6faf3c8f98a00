// What the kernels for Hopper GPUs share: barriers, bulk copies, 16-bit floats, quantization.
//
// Constants: FLOAT16 (else bfloat16), KIND (what x is: as it came, quantized already, or how it is quantized here, as reference.InputKind).

#define AS_IT_IS 0
#define PER_TOKEN 1
#define STATIC 2
#define CLIPPED 3
#define QUANTIZED 4  // already, by another kernel
#ifndef KIND  // a file that takes x as it comes
#define KIND AS_IT_IS
#endif
#define OWN_GRIDS (KIND == PER_TOKEN || KIND == CLIPPED)  // each token's own
#define LOWEST (KIND == CLIPPED ? -8.0f : -128.0f)
#define HIGHEST (KIND == CLIPPED ? 7.0f : 127.0f)

#if FLOAT16
#define FORMAT "f16"
#else
#define FORMAT "bf16"
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

struct __align__(16) Words { u32 at[4]; };

// Of one token: step, its reciprocal, zero-point on the int8 grid, sum of the integers.
struct __align__(16) Grid { float step, inverse; int zero, total; };

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

// Of this barrier in another block of the cluster. It says nothing about what this block wrote.
__device__ __forceinline__ void arrive_in_block(u64* barrier, u32 block) {
    asm volatile(
        "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address(barrier)), "r"(block) : "memory");
}

// As wait_for, once in the barrier's life, and what other blocks sent may be read.
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
__device__ __forceinline__ void fetch(void* here, const void* source, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(address(here)), "l"(source), "r"(bytes), "r"(address(barrier)) : "memory");
}

// As fetch, with a hint for the second-level cache.
__device__ __forceinline__ void fetch_hinted(void* here, const void* source, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(address(here)), "l"(source), "r"(bytes), "r"(address(barrier)), "l"(policy) : "memory");
}

// A barrier of the cluster that passes nothing on but that barriers are initialized. With "release" it would wait until every load
// that the multiprocessor has begun is done, weights included.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// To the same place in another block of the cluster; that block's `barrier` learns when the bytes are there.
__device__ __forceinline__ void send(void* here, u32 block, u32 value, u64* barrier) {
    asm volatile(
        "{\n .reg .b32 there, learns;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 learns, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %3, [learns];\n}"
        ::"r"(address(here)), "r"(address(barrier)), "r"(block), "r"(value) : "memory");
}

__device__ __forceinline__ void send_words(void* here, u32 block, const Words& words, u64* barrier) {
    asm volatile(
        "{\n .reg .b32 there, learns;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 learns, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [there], {%3, %4, %5, %6}, [learns];\n}"
        ::"r"(address(here)), "r"(address(barrier)), "r"(block), "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]),
          "r"(words.at[3]) : "memory");
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

__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 pair;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// The smaller and the larger one of two pairs, half by half; a NaN is neither.
__device__ __forceinline__ u32 smaller_halves(u32 a, u32 b) {
    u32 pair;
    asm("min." FORMAT "x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
    u32 pair;
    asm("max." FORMAT "x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

__device__ __forceinline__ Words load_words(const void* from, bool inside) {
    const Words none = {{0, 0, 0, 0}};
    return inside ? *(const Words*)from : none;
}

// sums += w x on tensor cores, 16-bit floats: 16 rows of w, 16 inputs, 8 tokens.
__device__ __forceinline__ void multiply_floats(float sums[4], const u32 w[4], const u32 x[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." FORMAT "." FORMAT ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]));
}

// The same for a lane's 16-byte words of rows g and g + 8 of w, and of x: 8 inputs that stand for those of two steps, in the same
// other order for both.
__device__ __forceinline__ void multiply_words(float sums[4], const Words (&w)[2], const Words& x) {
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
        const u32 operand[4] = {w[0].at[step], w[1].at[step], w[0].at[step + 1], w[1].at[step + 1]};
        multiply_floats(sums, operand, x.at + step);
    }
}

// Two inputs, as bytes on the int8 grid: clamp(round(x / step) + zero, LOWEST, HIGHEST), with IEEE division. The quotient by
// multiplication decides, except close to a border between two integers.
__device__ __forceinline__ u32 quantized_pair(u32 pair, const Grid& grid) {
    const float values[2] = {low_half(pair), high_half(pair)};
    const float magic = 12582912.0f;  // a sum with 1.5 * 2^23 has no fraction bits, and an integer's last byte as its own
    const float offset = magic + (float)grid.zero;
    float shifted[2], off[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#if KIND == STATIC  // values may lie far outside
        const float quotient = fminf(fmaxf(values[i] * grid.inverse, -1024.0f), 1024.0f);
        shifted[i] = quotient + offset;
        off[i] = fabsf(quotient - (shifted[i] - offset));
#else
        shifted[i] = __fmaf_rn(values[i], grid.inverse, offset);
        off[i] = fabsf(__fmaf_rn(values[i], grid.inverse, offset - shifted[i]));
#endif
    }
    if (fmaxf(off[0], off[1]) > 0.4998f) {
#pragma unroll
        for (int i = 0; i < 2; i++) shifted[i] = rintf(fminf(fmaxf(__fdiv_rn(values[i], grid.step), -1024.0f), 1024.0f)) + offset;
    }
    u32 bytes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) bytes[i] = __float_as_uint(fminf(fmaxf(shifted[i], magic + LOWEST), magic + HIGHEST));
    return __byte_perm(bytes[0], bytes[1], 0x0040);
}

// Tokens that another kernel quantized, all of one kind. Steps, and the zero-points (int) of PER_TOKEN, are each token's own;
// those of STATIC are all tokens', the zero-point (u8) on the unsigned grid.
__device__ __forceinline__ int common_zero(int kind, const u8* zeros) { return kind == STATIC ? *zeros - 128 : 0; }
__device__ __forceinline__ int own_step(int kind, int token) { return kind == STATIC ? 0 : token; }

__device__ __forceinline__ void fetch_word(void* here, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(here)), "l"(source) : "memory");
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float value) {
    const int bits = __float_as_int(value);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits >= 0 ? bits : bits ^ 0x7fffffff); }

// Of a token whose values, and 0, lie between low and high. ratio: calibrated, if CLIPPED.
__device__ __forceinline__ Grid own_grid(float low, float high, const float* ratio) {
#if KIND == CLIPPED
    float step = __fdiv_rn(fmaxf(-low, high) * *ratio, 7.5f);
    step = step > 0.0f ? step : 1.0f;
    return {step, __frcp_rn(step), 0, 0};
#else
    float step = __fdiv_rn(high - low, 255.0f);
    step = step > 0.0f ? step : 1.0f;
    const float zero = fminf(fmaxf(rintf(__fdiv_rn(-low, step)), 0.0f), 255.0f);
    return {step, __frcp_rn(step), (int)zero - 128, 0};
#endif
}
