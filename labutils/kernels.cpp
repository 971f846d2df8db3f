// Matrices of 4-bit codes on a CPU: quantized, dequantized, and multiplied without dequantizing.
//
// The layout is the one that bitsandbytes stores, so nothing is packed anew: two codes to a byte, the
// left of two neighbours in the high half, and a maximum per block of `block` weights. Where the
// maxima are themselves in 8 bits (double quantization), they are decoded on the way, row by row.
//
// A product of few tokens is limited by how fast memory delivers the codes. So each byte is read
// once: a row's codes become values through a table of 16 that lies in one register, are multiplied
// with up to four tokens' inputs, and only the sum over a block meets the block's maximum. Rows are
// read one after the other, a stream that memory delivers fastest; only where inputs are many or wide
// do four rows go side by side, to read each input once for all four.
//
// labutils/kernels.py says what each function takes, and falls back where this is not compiled.
// OpenMP's symbols are not linked: they are those that torch has loaded, or there would be two pools
// of threads, each waiting for work on the cores of the other.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr int GROUP = 64;          // weights whose codes fill half a register of 512 bits
constexpr int ROWS = 4;            // side by side
constexpr int TOKENS = 4;          // that share one decoding
constexpr int CHUNK = 4096;        // weights quantized at a time by one thread
constexpr int NESTED_BLOCK = 256;  // maxima that share a maximum
constexpr int PREFETCHED_BYTES = 2048;
constexpr int WIDE = 8192;  // columns whose inputs crowd the first cache

enum Instructions { PORTABLE, WITH_AVX2, WITH_AVX512_BF16 };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

float widened(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t rounded(float value) {
    if (value != value) return 0x7fc0;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace

extern "C" {

struct Weight {
    const uint8_t* codes;       // (rows, columns / 2)
    const float* table;         // (16)
    const float* maxima;        // (blocks), or nested (blocks / 256)
    const uint8_t* nested;      // (blocks) codes of the maxima, or null
    const float* nested_table;  // (256)
    const float* nested_offset;
    int64_t rows, columns, block;

    float maximum(int64_t number) const {
        if (!nested) return maxima[number];
        return nested_table[nested[number]] * maxima[number / NESTED_BLOCK] + *nested_offset;
    }
};

struct Product {
    Weight weight;
    const uint16_t* inputs;  // (tokens, columns) in bfloat16
    uint16_t* outputs;       // (tokens, rows) in bfloat16
    int64_t tokens;
};

int instructions() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"))
        return WITH_AVX512_BF16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return PORTABLE;
}
}

// Codes are read through from end to end; in pages of 2 MiB the processor finds them faster.
extern "C" void prefer_large_pages(uint8_t* begin, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t LARGE_PAGE = 1 << 21;
    const uintptr_t from = (uintptr_t(begin) + LARGE_PAGE - 1) & -LARGE_PAGE;
    const uintptr_t to = (uintptr_t(begin) + bytes) & -LARGE_PAGE;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// ---------------------------------------------------------------------------------------- quantize

namespace {

FOR_EACH_PROCESSOR void widen(const void* weights, Type type, int64_t first, int count, float* out) {
    if (type == FLOAT32) memcpy(out, static_cast<const float*>(weights) + first, 4 * count);
    if (type == BFLOAT16)
        for (int i = 0; i < count; i++)
            out[i] = widened(static_cast<const uint16_t*>(weights)[first + i]);
    if (type == FLOAT16)
        for (int i = 0; i < count; i++)
            out[i] = static_cast<const _Float16*>(weights)[first + i];
}

// The number of thresholds below a weight is the place of its value among the sorted ones.
FOR_EACH_PROCESSOR int quantize_block(const float* weights, int block, const float* thresholds,
                                      const uint8_t* order, uint8_t* codes, float* maximum) {
    float largest = 0;
    int unusable = 0;
    for (int i = 0; i < block; i++) {
        uint32_t bits;
        memcpy(&bits, weights + i, sizeof bits);
        unusable += (bits & 0x7f800000) == 0x7f800000;
        largest = std::max(largest, __builtin_fabsf(weights[i]));
    }
    *maximum = largest;
    const float scale = 1.0f / std::max(largest, 1e-38f);
    int32_t places[CHUNK];
    for (int i = 0; i < block; i++) {
        const float scaled = weights[i] * scale;
        int32_t place = 0;
        for (int t = 0; t < 15; t++) place += scaled > thresholds[t];
        places[i] = place;
    }
    for (int i = 0; i < block; i += 2)
        codes[i / 2] = order[places[i]] << 4 | order[places[i + 1]];
    return unusable;
}

}  // namespace

extern "C" int64_t quantize(const void* weights, int type, int64_t count, int block,
                            const float* thresholds, const uint8_t* order, uint8_t* codes,
                            float* maxima, int threads) {
    int64_t unusable = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : unusable)
    for (int64_t first = 0; first < count; first += CHUNK) {
        float chunk[CHUNK];
        const int size = std::min<int64_t>(CHUNK, count - first);
        widen(weights, Type(type), first, size, chunk);
        for (int at = 0; at < size; at += block)
            unusable += quantize_block(chunk + at, block, thresholds, order,
                                       codes + (first + at) / 2, maxima + (first + at) / block);
    }
    return unusable;
}

namespace {

constexpr float HALF_MAX = 65520, HALF_NORMAL = 0x1p-14f;

// `value` as float16 has it: 11 significant bits, and below 2**-14 multiples of 2**-24.
inline float as_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
    float normal;
    memcpy(&normal, &bits, sizeof normal);
    return __builtin_fabsf(value) < HALF_NORMAL ? (value + 0.75f) - 0.75f : normal;
}

FOR_EACH_PROCESSOR int measure_row(float* weights, int count, float* largest) {
    int unusable = 0;
    for (int i = 0; i < count; i++) {
        unusable += !(__builtin_fabsf(weights[i]) < HALF_MAX);
        weights[i] = as_half(weights[i]);
        *largest = std::max(*largest, __builtin_fabsf(weights[i]));
    }
    return unusable;
}

FOR_EACH_PROCESSOR void quantize_row(const float* weights, int count, float scale, int8_t* codes) {
    for (int i = 0; i < count; i++) {
        const float scaled = as_half(weights[i]) * scale;
        codes[i] = int8_t(int32_t((scaled + 0x1.8p23f) - 0x1.8p23f));  // to the nearest, ties even
    }
}

}  // namespace

extern "C" int64_t quantize_rows(const void* weights, int type, int64_t rows, int64_t columns,
                                 int8_t* codes, float* maxima, int threads) {
    int64_t unusable = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : unusable)
    for (int64_t row = 0; row < rows; row++) {
        float chunk[CHUNK];
        float largest = 0;
        for (int64_t at = 0; at < columns; at += CHUNK) {
            const int size = std::min<int64_t>(CHUNK, columns - at);
            widen(weights, Type(type), row * columns + at, size, chunk);
            unusable += measure_row(chunk, size, &largest);
        }
        maxima[row] = largest;
        const float scale = largest > 0 ? 1.0f / largest * 127.0f : 0;
        for (int64_t at = 0; at < columns; at += CHUNK) {
            const int size = std::min<int64_t>(CHUNK, columns - at);
            widen(weights, Type(type), row * columns + at, size, chunk);
            quantize_row(chunk, size, scale, codes + row * columns + at);
        }
    }
    return unusable;
}

// -------------------------------------------------------------------------------------- dequantize

namespace {

void maxima_portable(const Weight& weight, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = weight.maximum(first + i);
}

template <typename T>
void lookup(const uint8_t* codes, const T* values, int64_t count, T* out) {
    for (int64_t i = 0; i < count / 2; i++) {
        out[2 * i] = values[codes[i] >> 4];
        out[2 * i + 1] = values[codes[i] & 15];
    }
}

void dequantize_block(const Weight& weight, const uint8_t* codes, float maximum, float* out) {
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = weight.table[i] * maximum;
    lookup(codes, values, weight.block, out);
}

void dequantize_block(const Weight& weight, const uint8_t* codes, float maximum, uint16_t* out) {
    uint16_t values[16];
    for (int i = 0; i < 16; i++) values[i] = rounded(weight.table[i] * maximum);
    lookup(codes, values, weight.block, out);
}

#if defined(__x86_64__)

AVX512 void maxima_avx512(const Weight& weight, int64_t first, int64_t count, float* out) {
    int64_t i = 0;
    while (weight.nested && i + 16 <= count) {
        const int64_t number = first + i;
        if (number % NESTED_BLOCK > NESTED_BLOCK - 16) {
            out[i++] = weight.maximum(number);
            continue;
        }
        const __m512i codes = _mm512_cvtepu8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.nested + number)));
        const __m512 scaled = _mm512_mul_ps(_mm512_i32gather_ps(codes, weight.nested_table, 4),
                                            _mm512_set1_ps(weight.maxima[number / NESTED_BLOCK]));
        _mm512_storeu_ps(out + i, _mm512_add_ps(scaled, _mm512_set1_ps(*weight.nested_offset)));
        i += 16;
    }
    maxima_portable(weight, first + i, count - i, out + i);
}

// Blocks of whole groups.
AVX512 void dequantize_block_avx512(const Weight& weight, const uint8_t* codes, float maximum,
                                    uint16_t* out) {
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(weight.table), _mm512_set1_ps(maximum));
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i even_up = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(even_up, _mm512_set1_epi32(0x7fff));
    const __m256i halves =
        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, up), 16));
    const __m512i table = _mm512_broadcast_i64x4(halves);
    uint16_t places[64];  // an even and an odd neighbour in turn
    for (int i = 0; i < 64; i++) places[i] = i % 2 * 32 + i / 2;
    const __m512i left = _mm512_loadu_si512(places), right = _mm512_loadu_si512(places + 32);
    for (int64_t i = 0; i < weight.block; i += GROUP) {
        const __m512i bytes = _mm512_cvtepu8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i / 2)));
        const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
        const __m512i odd = _mm512_permutexvar_epi16(bytes, table);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(even, right, odd));
    }
}

#endif

}  // namespace

// `count` blocks, from the one numbered `first` on.
extern "C" void dequantize(const Weight* weight, int64_t first, int64_t count, int type, void* out,
                           int threads, int level) {
    constexpr int64_t TOGETHER = 64;
    const int64_t block = weight->block;
    const bool wide = level == WITH_AVX512_BF16 && block % GROUP == 0;
#pragma omp parallel for num_threads(threads)
    for (int64_t from = 0; from < count; from += TOGETHER) {
        const int64_t to = std::min(from + TOGETHER, count);
        float maxima[TOGETHER];
#if defined(__x86_64__)
        if (wide) maxima_avx512(*weight, first + from, to - from, maxima);
#endif
        if (!wide) maxima_portable(*weight, first + from, to - from, maxima);
        for (int64_t number = from; number < to; number++) {
            const uint8_t* codes = weight->codes + (first + number) * block / 2;
            const float maximum = maxima[number - from];
            const int64_t place = number * block;
            if (type == FLOAT32)
                dequantize_block(*weight, codes, maximum, static_cast<float*>(out) + place);
            else if (!wide)
                dequantize_block(*weight, codes, maximum, static_cast<uint16_t*>(out) + place);
#if defined(__x86_64__)
            else
                dequantize_block_avx512(*weight, codes, maximum,
                                        static_cast<uint16_t*>(out) + place);
#endif
        }
    }
}

// ---------------------------------------------------------------------------------------- multiply
//
// Inputs are laid out for it once: of every 64 the 32 even ones, then the 32 odd ones, as the high and
// the low halves of 32 bytes of codes meet them. `dot_*` gives out[row][token] for R rows, T tokens.

namespace {

template <typename T>
struct Inputs {
    std::vector<T> values;  // (tokens, columns)

    Inputs(const Product& product) : values(product.tokens * product.weight.columns) {
        for (size_t first = 0; first < values.size(); first += GROUP)
            for (int i = 0; i < GROUP; i++)
                values[first + i % 2 * 32 + i / 2] = converted(product.inputs[first + i]);
    }
    static T converted(uint16_t value) {
        if constexpr (sizeof(T) == sizeof value) return value;
        return widened(value);
    }
};

struct Portable {
    using Input = float;

    static constexpr auto maxima = maxima_portable;

    template <int R, int T>
    static void dot(const Weight& weight, int64_t row, const float* maxima, const float* inputs,
                    float (*out)[TOKENS]) {
        const int64_t columns = weight.columns, blocks = columns / weight.block;
        for (int r = 0; r < R; r++) {
            const uint8_t* codes = weight.codes + (row + r) * columns / 2;
            for (int t = 0; t < T; t++) out[r][t] = 0;
            for (int64_t b = 0; b < blocks; b++) {
                float sums[T] = {};
                for (int64_t at = b * weight.block; at < (b + 1) * weight.block; at += GROUP)
                    for (int i = 0; i < GROUP / 2; i++) {
                        const uint8_t pair = codes[at / 2 + i];
                        const float even = weight.table[pair >> 4], odd = weight.table[pair & 15];
                        for (int t = 0; t < T; t++) {
                            const float* x = inputs + t * columns + at + i;
                            sums[t] += even * x[0] + odd * x[GROUP / 2];
                        }
                    }
                for (int t = 0; t < T; t++) out[r][t] += sums[t] * maxima[r * blocks + b];
            }
        }
    }
};

#if defined(__x86_64__)

struct Avx2 : Portable {

    AVX2 static __m256 lookup(__m256i codes, __m256 lower, __m256 upper) {
        const __m256 in_upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, codes),
                                _mm256_permutevar8x32_ps(upper, codes), in_upper);
    }

    AVX2 static float sum(__m256 lanes) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }

    template <int R, int T>
    AVX2 static void dot(const Weight& weight, int64_t row, const float* maxima,
                         const float* inputs, float (*out)[TOKENS]) {
        const int64_t columns = weight.columns, blocks = columns / weight.block;
        const __m256 lower = _mm256_loadu_ps(weight.table);
        const __m256 upper = _mm256_loadu_ps(weight.table + 8);
        for (int r = 0; r < R; r++) {
            const uint8_t* codes = weight.codes + (row + r) * columns / 2;
            __m256 totals[T];
            for (auto& total : totals) total = _mm256_setzero_ps();
            for (int64_t b = 0; b < blocks; b++) {
                __m256 sums[T];
                for (auto& sum : sums) sum = _mm256_setzero_ps();
                for (int64_t at = b * weight.block; at < (b + 1) * weight.block; at += GROUP)
                    for (int i = 0; i < GROUP / 2; i += 8) {
                        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                            reinterpret_cast<const __m128i*>(codes + at / 2 + i)));
                        const __m256 even = lookup(_mm256_srli_epi32(bytes, 4), lower, upper);
                        const __m256 odd = lookup(bytes, lower, upper);
                        for (int t = 0; t < T; t++) {
                            const float* x = inputs + t * columns + at + i;
                            sums[t] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x), sums[t]);
                            sums[t] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + GROUP / 2), sums[t]);
                        }
                    }
                const __m256 maximum = _mm256_set1_ps(maxima[r * blocks + b]);
                for (int t = 0; t < T; t++)
                    totals[t] = _mm256_fmadd_ps(sums[t], maximum, totals[t]);
            }
            for (int t = 0; t < T; t++) out[r][t] = sum(totals[t]);
        }
    }
};

struct Avx512Bf16 {
    using Input = uint16_t;

    static constexpr auto maxima = maxima_avx512;

    template <int R, int T>
    AVX512 static void dot(const Weight& weight, int64_t row, const float* maxima,
                           const uint16_t* inputs, float (*out)[TOKENS]) {
        const int64_t columns = weight.columns, blocks = columns / weight.block;
        const uint8_t* codes = weight.codes + row * columns / 2;
        uint16_t values[32];
        for (int i = 0; i < 32; i++) values[i] = rounded(weight.table[i % 16]);
        const __m512i table = _mm512_loadu_si512(values);
        __m512 totals[R][T];
        for (auto& of_row : totals)
            for (auto& total : of_row) total = _mm512_setzero_ps();
        const size_t row_bytes = columns / 2;
        for (int64_t b = 0; b < blocks; b++) {
            __m512 sums[R][T];
            for (auto& of_row : sums)
                for (auto& sum : of_row) sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < weight.block; i += GROUP) {
                for (int r = 0; r < R; r++) {
                    const uint8_t* place = codes + r * row_bytes;
                    _mm_prefetch(place + PREFETCHED_BYTES, _MM_HINT_NTA);
                    const __m512i bytes = _mm512_cvtepu8_epi16(
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
                    const auto even =
                        (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
                    const auto odd = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
                    for (int t = 0; t < T; t++) {
                        const uint16_t* x = inputs + t * columns;
                        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], even,
                                                      (__m512bh)_mm512_loadu_si512(x));
                        sums[r][t] = _mm512_dpbf16_ps(
                            sums[r][t], odd, (__m512bh)_mm512_loadu_si512(x + GROUP / 2));
                    }
                }
                codes += GROUP / 2;
                inputs += GROUP;
            }
            for (int r = 0; r < R; r++) {
                const __m512 maximum = _mm512_set1_ps(maxima[r * blocks + b]);
                for (int t = 0; t < T; t++)
                    totals[r][t] = _mm512_fmadd_ps(sums[r][t], maximum, totals[r][t]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) out[r][t] = _mm512_reduce_add_ps(totals[r][t]);
    }
};

#endif

template <class Processor, int R, int T>
void multiply_rows(const Product& product, int64_t row, const float* maxima, int64_t token,
                   const typename Processor::Input* inputs) {
    float out[R][TOKENS];
    const Weight& weight = product.weight;
    Processor::template dot<R, T>(weight, row, maxima, inputs + token * weight.columns, out);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++)
            product.outputs[(token + t) * weight.rows + row + r] = rounded(out[r][t]);
}

template <class Processor, int R>
void multiply_rows(const Product& product, int64_t row, float* maxima,
                   const typename Processor::Input* inputs) {
    const int64_t blocks = product.weight.columns / product.weight.block;
    Processor::maxima(product.weight, row * blocks, R * blocks, maxima);
    int64_t token = 0;
    for (; token + TOKENS <= product.tokens; token += TOKENS)
        multiply_rows<Processor, R, TOKENS>(product, row, maxima, token, inputs);
    switch (product.tokens - token) {
        case 1: return multiply_rows<Processor, R, 1>(product, row, maxima, token, inputs);
        case 2: return multiply_rows<Processor, R, 2>(product, row, maxima, token, inputs);
        case 3: return multiply_rows<Processor, R, 3>(product, row, maxima, token, inputs);
    }
}

template <class Processor>
void multiply_all(const Product* products, int count, int threads) {
    std::vector<Inputs<typename Processor::Input>> inputs(products, products + count);
#pragma omp parallel num_threads(threads)
    for (int number = 0; number < count; number++) {
        const Product& product = products[number];
        const Weight& weight = product.weight;
        const auto* values = inputs[number].values.data();
        std::vector<float> maxima(ROWS * weight.columns / weight.block);
        const bool few = product.tokens < TOKENS && weight.columns < WIDE;
        const int64_t side_by_side = few ? 1 : ROWS;
        const int64_t groups = weight.rows / side_by_side;
#pragma omp for schedule(static) nowait
        for (int64_t group = 0; group < groups; group++) {
            if (side_by_side == 1)
                multiply_rows<Processor, 1>(product, group, maxima.data(), values);
            else
                multiply_rows<Processor, ROWS>(product, group * ROWS, maxima.data(), values);
        }
#pragma omp for schedule(static) nowait
        for (int64_t row = groups * side_by_side; row < weight.rows; row++)
            multiply_rows<Processor, 1>(product, row, maxima.data(), values);
    }
}

}  // namespace

extern "C" void multiply(const Product* products, int count, int threads, int level) {
#if defined(__x86_64__)
    if (level == WITH_AVX512_BF16) return multiply_all<Avx512Bf16>(products, count, threads);
    if (level == WITH_AVX2) return multiply_all<Avx2>(products, count, threads);
#endif
    multiply_all<Portable>(products, count, threads);
}
