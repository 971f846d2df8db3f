// Matrices of 4-bit codes on a CPU: quantized, dequantized, and multiplied without dequantizing.
//
// The layout is the one that bitsandbytes stores, so nothing is packed anew: two codes to a byte, the
// left of two neighbours in the high half, and a maximum per block of `block` weights. Where the
// maxima are themselves in 8 bits (double quantization), they are decoded on the way, some rows at a
// time.
//
// A product of few tokens is limited by how fast memory delivers the codes. So each byte is read
// once: a row's codes become values through a table of 16 that lies in one register, are multiplied
// with up to four tokens' inputs, and only the sum over a block meets the block's maximum. Rows are
// read one after the other, a stream that memory delivers fastest; only where tokens are many do two
// rows go side by side, to read each input once for both.
//
// labutils/kernels.py says what each function takes, labutils/experts.py what is done without them.
// OpenMP's symbols are not linked: they are those that torch has loaded, or there would be two pools
// of threads, each waiting for work on the cores of the other.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define AVX512_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))
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
constexpr int ROWS = 2;            // side by side, where there are many tokens
constexpr int TOKENS = 4;          // that share one decoding
constexpr int64_t TASK_WEIGHTS = 1 << 18;  // that a thread takes at a time, and keeps in its cache
constexpr int CHUNK = 4096;        // weights quantized at a time by one thread
constexpr int NESTED_BLOCK = 256;  // maxima that share a maximum
constexpr int PREFETCHED_BYTES = 8192;  // so far ahead, into the second cache

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
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
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

void find_nested_maxima(const Weight& weight, int64_t first, int64_t count, float* out) {
    const uint8_t* codes = weight.nested;
    const float *table = weight.nested_table, offset = *weight.nested_offset;
    const int64_t last = first + count;
    while (first < last) {
        const float scale = weight.maxima[first / NESTED_BLOCK];
        const int64_t end = std::min(last, (first / NESTED_BLOCK + 1) * NESTED_BLOCK);
        const int64_t same = end - first;
        for (int64_t i = 0; i < same; i++) out[i] = table[codes[first + i]];
        for (int64_t i = 0; i < same; i++) out[i] = out[i] * scale + offset;
        out += same;
        first = end;
    }
}

#if defined(__x86_64__)

// The numbers of a table by the first of their four bytes, by the second, and so on: a register holds
// 64 bytes, so that 64 numbers can be looked up at once.
struct Planes {
    float table[256] = {};
    alignas(64) uint8_t bytes[4][256] = {};

    const Planes& of(const float* wanted) {
        if (memcmp(table, wanted, sizeof table)) {
            memcpy(table, wanted, sizeof table);
            for (int i = 0; i < 1024; i++)
                bytes[i % 4][i / 4] = reinterpret_cast<const uint8_t*>(table)[i];
        }
        return *this;
    }
};

AVX512_VBMI void find_nested_maxima_vbmi(const Weight& weight, int64_t first, int64_t count,
                                         float* out) {
    static thread_local Planes kept;
    const Planes& planes = kept.of(weight.nested_table);
    const __m512 offset = _mm512_set1_ps(*weight.nested_offset);
    uint8_t places[64];  // of which four neighbours come to lie in each of four lanes
    for (int i = 0; i < 64; i++) places[i] = i % 16 / 4 * 16 + i / 16 * 4 + i % 4;
    const __m512i order = _mm512_loadu_si512(places);
    const int64_t last = first + count;
    while (first < last) {
        _mm_prefetch(weight.nested + first + count, _MM_HINT_T0);  // for the next task
        const int64_t same = NESTED_BLOCK - first % NESTED_BLOCK;
        const int64_t at_once = std::min({int64_t(64), last - first, same});
        const __mmask64 there = ~0ull >> (64 - at_once);
        const __m512i codes =
            _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(there, weight.nested + first));
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        __m512i bytes[4];
        for (int b = 0; b < 4; b++) {
            const auto* plane = reinterpret_cast<const __m512i*>(planes.bytes[b]);
            bytes[b] = _mm512_mask_blend_epi8(
                upper, _mm512_permutex2var_epi8(plane[0], codes, plane[1]),
                _mm512_permutex2var_epi8(plane[2], codes, plane[3]));
        }
        const __m512i lower_halves[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]),
                                         _mm512_unpackhi_epi8(bytes[0], bytes[1])};
        const __m512i upper_halves[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]),
                                         _mm512_unpackhi_epi8(bytes[2], bytes[3])};
        const __m512 scale = _mm512_set1_ps(weight.maxima[first / NESTED_BLOCK]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const __m512i lower = lower_halves[q / 2], upper = upper_halves[q / 2];
            const __m512 found = _mm512_castsi512_ps(q % 2 ? _mm512_unpackhi_epi16(lower, upper)
                                                           : _mm512_unpacklo_epi16(lower, upper));
            _mm512_mask_storeu_ps(out + 16 * q, there >> 16 * q,
                                  _mm512_add_ps(_mm512_mul_ps(found, scale), offset));
        }
        first += at_once;
        out += at_once;
    }
}

#endif

// `count` maxima from the one numbered `first` on.
void find_maxima(const Weight& weight, int64_t first, int64_t count, int level, float* out) {
    if (!weight.nested) {
        std::copy_n(weight.maxima + first, count, out);
        return;
    }
#if defined(__x86_64__)
    static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
    if (vbmi && level == WITH_AVX512_BF16)
        return find_nested_maxima_vbmi(weight, first, count, out);
#endif
    find_nested_maxima(weight, first, count, out);
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
        find_maxima(*weight, first + from, to - from, level, maxima);
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
// Inputs are laid out for it once, as the codes in a register meet them: where `SHARED` codes lie in
// one lane, of every `GROUP` inputs first those that meet a lane's first code, then those that meet
// its second. Then `rows` multiplies R rows at a time with T tokens.

namespace {

template <class Processor>
struct Inputs {
    static constexpr int GROUP = Processor::GROUP, LANES = GROUP / Processor::SHARED;
    using Value = typename Processor::Input;

    int64_t columns;            // in whole groups
    std::vector<Value> values;  // (tokens, columns), and zeros where there is no input

    Inputs(const uint16_t* inputs, int64_t tokens, int64_t from_columns)
        : columns((from_columns + GROUP - 1) / GROUP * GROUP), values(tokens * columns) {
        const int64_t whole = from_columns / GROUP * GROUP;
        Value* out = values.data();
        for (int64_t token = 0; token < tokens; token++, inputs += from_columns, out += columns) {
            for (int64_t group = 0; group < whole; group += GROUP)
                for (int k = 0; k < Processor::SHARED; k++)
                    for (int lane = 0; lane < LANES; lane++)
                        out[group + k * LANES + lane] =
                            converted(inputs[group + lane * Processor::SHARED + k]);
            for (int64_t i = whole; i < from_columns; i++)
                out[whole + i % Processor::SHARED * LANES + (i - whole) / Processor::SHARED] =
                    converted(inputs[i]);
        }
    }

    static Value converted(uint16_t value) {
        if constexpr (sizeof(Value) == sizeof value) return value;
        return widened(value);
    }
};

// Some rows of a product, from `first_row` to before `last_row`, whose maxima have been found.
template <class Processor>
struct Task {
    const Product& product;
    const Inputs<Processor>& inputs;
    int64_t first_row, last_row, row_blocks;
    const float* maxima;

    const float* maxima_of(int64_t row) const { return maxima + (row - first_row) * row_blocks; }

    const typename Processor::Input* inputs_of(int64_t token) const {
        return inputs.values.data() + token * inputs.columns;
    }
    void put(int64_t row, int64_t token, float value) const {
        product.outputs[token * product.weight.rows + row] = rounded(value);
    }
};

// A processor that sums up one row after the other with its `dot`.
template <class Processor>
struct RowByRow {
    using Input = float;
    static constexpr int GROUP = ::GROUP, SHARED = 2;

    template <int R, int T>
    static void rows(const Task<Processor>& task, int64_t token) {
        const Weight& weight = task.product.weight;
        float sums[T];
        for (int64_t row = task.first_row; row < task.last_row; row++) {
            const uint8_t* codes = weight.codes + row * weight.columns / 2;
            Processor::template dot<T>(task, codes, task.maxima_of(row), token, sums);
            for (int t = 0; t < T; t++) task.put(row, token + t, sums[t]);
        }
    }
};

struct Portable : RowByRow<Portable> {
    static constexpr int LEVEL = PORTABLE;

    template <int T>
    static void dot(const Task<Portable>& task, const uint8_t* codes, const float* maxima,
                    int64_t token, float* out) {
        const Weight& weight = task.product.weight;
        std::fill_n(out, T, 0.0f);
        for (int64_t first = 0; first < weight.columns; first += weight.block) {
            float sums[T] = {};
            for (int64_t at = first; at < first + weight.block; at += GROUP)
                for (int i = 0; i < GROUP / 2; i++) {
                    const uint8_t pair = *codes++;
                    const float even = weight.table[pair >> 4], odd = weight.table[pair & 15];
                    for (int t = 0; t < T; t++) {
                        const float* x = task.inputs_of(token + t) + at + i;
                        sums[t] += even * x[0] + odd * x[GROUP / 2];
                    }
                }
            for (int t = 0; t < T; t++) out[t] += sums[t] * *maxima;
            maxima++;
        }
    }
};

#if defined(__x86_64__)

struct Avx2 : RowByRow<Avx2> {
    static constexpr int LEVEL = WITH_AVX2;

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

    template <int T>
    AVX2 static void dot(const Task<Avx2>& task, const uint8_t* codes, const float* maxima,
                         int64_t token, float* out) {
        const Weight& weight = task.product.weight;
        const __m256 lower = _mm256_loadu_ps(weight.table);
        const __m256 upper = _mm256_loadu_ps(weight.table + 8);
        __m256 totals[T];
        for (auto& total : totals) total = _mm256_setzero_ps();
        for (int64_t first = 0; first < weight.columns; first += weight.block) {
            __m256 sums[T];
            for (auto& sum : sums) sum = _mm256_setzero_ps();
            for (int64_t at = first; at < first + weight.block; at += GROUP)
                for (int i = 0; i < GROUP / 2; i += 8) {
                    const __m256i bytes = _mm256_cvtepu8_epi32(
                        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
                    const __m256 even = lookup(_mm256_srli_epi32(bytes, 4), lower, upper);
                    const __m256 odd = lookup(bytes, lower, upper);
                    for (int t = 0; t < T; t++) {
                        const float* x = task.inputs_of(token + t) + at + i;
                        sums[t] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x), sums[t]);
                        sums[t] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + GROUP / 2), sums[t]);
                    }
                    codes += 8;
                }
            const __m256 maximum = _mm256_set1_ps(*maxima++);
            for (int t = 0; t < T; t++) totals[t] = _mm256_fmadd_ps(sums[t], maximum, totals[t]);
        }
        for (int t = 0; t < T; t++) out[t] = sum(totals[t]);
    }
};

struct Avx512Bf16 {
    using Input = uint16_t;
    static constexpr int LEVEL = WITH_AVX512_BF16;
    static constexpr int GROUP = 128, SHARED = 4;
    static constexpr int SHIFTS[SHARED] = {4, 0, 12, 8};  // of a word's four codes

    // Sums over the lanes of each.
    AVX512 static __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d ab_pairs = _mm512_castps_pd(ab), cd_pairs = _mm512_castps_pd(cd);
        const __m512 all =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pairs, cd_pairs)),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pairs, cd_pairs)));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }

    // Adds to each token's sums its products with a group of codes, whose two halves lie each within
    // one block.
    template <int T>
    AVX512 INLINE static void add(__m512i words, __m512i table, __m512 maximum,
                                  const uint16_t* const* inputs, int64_t at, __m512* sums) {
        __m512bh factors[SHARED];
#pragma GCC unroll 4
        for (int k = 0; k < SHARED; k++)
            factors[k] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, SHIFTS[k]), table);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int k = 0; k < SHARED; k++) {
                const uint16_t* x = inputs[t] + at + k * GROUP / SHARED;
                sum = _mm512_dpbf16_ps(sum, factors[k], (__m512bh)_mm512_loadu_si512(x));
            }
            sums[t] = _mm512_fmadd_ps(sum, maximum, sums[t]);
        }
    }

    // Four rows after another, R at a time side by side.
    template <int R, int T>
    AVX512 static void rows(const Task<Avx512Bf16>& task, int64_t token) {
        constexpr int FOUR = 4;
        const Weight& weight = task.product.weight;
        const int64_t columns = weight.columns;
        const int to_block = __builtin_ctzll(weight.block);
        uint16_t values[32];  // twice the table: of the five bits of a place the first is not ours
        for (int i = 0; i < 32; i++) values[i] = rounded(weight.table[i % 16]);
        const __m512i table = _mm512_loadu_si512(values);
        const uint16_t* inputs[T];
        for (int t = 0; t < T; t++) inputs[t] = task.inputs_of(token + t);
        for (int64_t first = task.first_row; first < task.last_row; first += FOUR) {
            __m512 totals[FOUR][T];
#pragma GCC unroll 4
            for (int q = 0; q < FOUR; q += R) {
                const uint8_t* codes[R];
                const float* maxima[R];
                __m512 sums[R][T];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const int64_t row = std::min(first + q + r, task.last_row - 1);
                    codes[r] = weight.codes + row * columns / 2;
                    maxima[r] = task.maxima_of(row);
                    for (auto& sum : sums[r]) sum = _mm512_setzero_ps();
                }
                int64_t at = 0;
                for (; at + GROUP <= columns; at += GROUP)
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) {
                        _mm_prefetch(codes[r] + at / 2 + PREFETCHED_BYTES, _MM_HINT_T1);
                        const __m512 maximum = _mm512_mask_broadcastss_ps(
                            _mm512_set1_ps(maxima[r][at >> to_block]), 0xff00,
                            _mm_load_ss(maxima[r] + ((at + GROUP / 2) >> to_block)));
                        add<T>(_mm512_loadu_si512(codes[r] + at / 2), table, maximum, inputs, at,
                               sums[r]);
                    }
                if (at < columns)
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        add<T>(_mm512_maskz_loadu_epi64(0x0f, codes[r] + at / 2), table,
                               _mm512_set1_ps(maxima[r][at >> to_block]), inputs, at, sums[r]);
                for (int r = 0; r < R; r++)
                    for (int t = 0; t < T; t++) totals[q + r][t] = sums[r][t];
            }
            const __mmask8 there = (1 << std::min<int64_t>(FOUR, task.last_row - first)) - 1;
            for (int t = 0; t < T; t++) {
                const __m128 four = sums(totals[0][t], totals[1][t], totals[2][t], totals[3][t]);
                uint16_t* out = task.product.outputs + (token + t) * weight.rows + first;
                _mm_mask_storeu_epi16(out, there, (__m128i)_mm_cvtneps_pbh(four));
            }
        }
    }
};

#endif

template <class Processor, int R>
void multiply_rows(const Task<Processor>& task) {
    const int64_t tokens = task.product.tokens;
    int64_t token = 0;
    for (; token + TOKENS <= tokens; token += TOKENS)
        Processor::template rows<R, TOKENS>(task, token);
    switch (tokens - token) {
        case 1: return Processor::template rows<R, 1>(task, token);
        case 2: return Processor::template rows<R, 2>(task, token);
        case 3: return Processor::template rows<R, 3>(task, token);
    }
}

// A thread has rows that follow one another, as memory delivers those fastest.
template <class Processor>
void multiply_all(const Product* products, int count, int threads) {
    std::vector<Inputs<Processor>> inputs;
    inputs.reserve(count);
    std::vector<Task<Processor>> tasks;
    for (const Product* product = products; product < products + count; product++) {
        const bool same = product > products && product->inputs == product[-1].inputs;
        if (!same) inputs.emplace_back(product->inputs, product->tokens, product->weight.columns);
        const int64_t rows = product->weight.rows;
        const int64_t row_blocks = product->weight.columns / product->weight.block;
        const int64_t at_once = std::max<int64_t>(TASK_WEIGHTS / product->weight.columns, 1);
        for (int64_t row = 0; row < rows; row += at_once)
            tasks.push_back({*product, inputs.back(), row, std::min(row + at_once, rows),
                             row_blocks, nullptr});
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> maxima;
#pragma omp for schedule(static)
        for (size_t number = 0; number < tasks.size(); number++) {
            Task<Processor> task = tasks[number];
            const Weight& weight = task.product.weight;
            const int64_t first = task.first_row * task.row_blocks;
            const int64_t last = task.last_row * task.row_blocks;
            task.maxima = weight.maxima + first;
            if (weight.nested) {
                maxima.resize(last - first);
                find_maxima(weight, first, last - first, Processor::LEVEL, maxima.data());
                task.maxima = maxima.data();
            }
            if (task.product.tokens < TOKENS)
                multiply_rows<Processor, 1>(task);
            else
                multiply_rows<Processor, ROWS>(task);
        }
    }
}

void multiply_products(const Product* products, int count, int threads, int level) {
#if defined(__x86_64__)
    if (level == WITH_AVX512_BF16) return multiply_all<Avx512Bf16>(products, count, threads);
    if (level == WITH_AVX2) return multiply_all<Avx2>(products, count, threads);
#endif
    multiply_all<Portable>(products, count, threads);
}

}  // namespace

// The same inputs times several matrices; the outputs of one lie behind those of the other.
extern "C" void multiply(const Weight* const* weights, int count, const uint16_t* inputs,
                         uint16_t* outputs, int64_t tokens, int threads, int level) {
    std::vector<Product> products;
    for (int i = 0; i < count; outputs += tokens * weights[i++]->rows)
        products.push_back({*weights[i], inputs, outputs, tokens});
    multiply_products(products.data(), count, threads, level);
}

// ----------------------------------------------------------------------------- between the matrices
//
// What a layer computes between its matrices is little work, but a dozen operations of torch, each of
// which takes longer than its work. Here each is one call, and rounds to bfloat16 where torch does.

namespace {

constexpr int LANES = 16;
constexpr int64_t WORTH_A_THREAD = 1 << 15;  // multiplications

INLINE float dot(const uint16_t* a, const uint16_t* b, int64_t size) {
    float sums[LANES] = {}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += widened(a[i + lane]) * widened(b[i + lane]);
    for (; i < size; i++) sum += widened(a[i]) * widened(b[i]);
    for (float lane : sums) sum += lane;
    return sum;
}

// Within three units in the last place: 2**n times the Taylor series of the rest, |rest| <= ln(2)/2.
INLINE float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = (x * 0x1.715476p0f + 0x1.8p23f) - 0x1.8p23f;
    const float rest = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float series = 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 1.0f / 2;
    series = (series * rest + 1.0f) * rest + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

// Some rows of a matrix in bfloat16, from `first` to before `last`, times few tokens.
struct Task16 {
    const uint16_t* weight;
    int64_t rows, columns;
    const uint16_t* inputs;
    int64_t tokens;
    uint16_t* outputs;
    int64_t first, last;
};

FOR_EACH_PROCESSOR void multiply_rows_16bit(const Task16& task) {
    for (int64_t row = task.first; row < task.last; row++)
        for (int64_t token = 0; token < task.tokens; token++)
            task.outputs[token * task.rows + row] =
                rounded(dot(task.weight + row * task.columns, task.inputs + token * task.columns,
                            task.columns));
}

#if defined(__x86_64__)

template <int T>
AVX512 void multiply_rows_16bit_avx512(const Task16& task) {
    constexpr int AT_ONCE = 32;
    for (int64_t row = task.first; row < task.last; row++) {
        const uint16_t* weight = task.weight + row * task.columns;
        __m512 sums[T];
        for (auto& sum : sums) sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < task.columns; at += AT_ONCE) {
            const int64_t left = std::min<int64_t>(AT_ONCE, task.columns - at);
            const __mmask32 there = ~0u >> (AT_ONCE - left);
            _mm_prefetch(weight + at + PREFETCHED_BYTES / 2, _MM_HINT_T1);
            const auto factors = (__m512bh)_mm512_maskz_loadu_epi16(there, weight + at);
            for (int t = 0; t < T; t++) {
                const uint16_t* x = task.inputs + t * task.columns + at;
                sums[t] = _mm512_dpbf16_ps(sums[t], factors,
                                           (__m512bh)_mm512_maskz_loadu_epi16(there, x));
            }
        }
        for (int t = 0; t < T; t++)
            task.outputs[t * task.rows + row] = rounded(_mm512_reduce_add_ps(sums[t]));
    }
}

#endif

void multiply_rows_16bit(const Task16& task, int level) {
#if defined(__x86_64__)
    if (level == WITH_AVX512_BF16) switch (task.tokens) {
        case 1: return multiply_rows_16bit_avx512<1>(task);
        case 2: return multiply_rows_16bit_avx512<2>(task);
        case 3: return multiply_rows_16bit_avx512<3>(task);
        case 4: return multiply_rows_16bit_avx512<4>(task);
    }
#endif
    multiply_rows_16bit(task);
}

FOR_EACH_PROCESSOR void gate(const uint16_t* gates, uint16_t* ups, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float x = widened(gates[i]);
        const uint16_t silu = rounded(x / (1.0f + exponential(-x)));
        ups[i] = rounded(widened(silu) * widened(ups[i]));
    }
}

FOR_EACH_PROCESSOR void norm_row(const uint16_t* x, const uint16_t* weight, float epsilon,
                                 int64_t columns, uint16_t* out) {
    const float scale = 1.0f / __builtin_sqrtf(dot(x, x, columns) / columns + epsilon);
    for (int64_t i = 0; i < columns; i++)
        out[i] = rounded(widened(weight[i]) * widened(rounded(widened(x[i]) * scale)));
}

FOR_EACH_PROCESSOR void attend_head(const uint16_t* query, const uint16_t* keys,
                                    const uint16_t* values, int64_t length, int64_t size,
                                    float scale, float* scores, float* sums, uint16_t* out) {
    float highest = -__builtin_inff(), total = 0;
    for (int64_t i = 0; i < length; i++) {
        scores[i] = dot(query, keys + i * size, size) * scale;
        highest = std::max(highest, scores[i]);
    }
    for (int64_t i = 0; i < length; i++) scores[i] = exponential(scores[i] - highest);
    std::fill_n(sums, size, 0.0f);
    for (int64_t i = 0; i < length; i++) {
        total += scores[i];
        for (int64_t j = 0; j < size; j++) sums[j] += scores[i] * widened(values[i * size + j]);
    }
    for (int64_t j = 0; j < size; j++) out[j] = rounded(sums[j] / total);
}

}  // namespace

// A matrix (rows, columns) in bfloat16 times few tokens.
extern "C" void multiply_16bit(const uint16_t* weight, int64_t rows, int64_t columns,
                               const uint16_t* inputs, int64_t tokens, uint16_t* outputs,
                               int threads, int level) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        multiply_rows_16bit({weight, rows, columns, inputs, tokens, outputs,
                             rows * thread / threads, rows * (thread + 1) / threads}, level);
}

extern "C" void norm(const uint16_t* x, const uint16_t* weight, float epsilon, int64_t rows,
                     int64_t columns, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > WORTH_A_THREAD)
    for (int64_t row = 0; row < rows; row++)
        norm_row(x + row * columns, weight, epsilon, columns, out + row * columns);
}

// Rotary positions, in place: the two halves of each of `heads` vectors of `size` turn together. From
// one sequence to the next are `stride` cosines and sines.
extern "C" void rotate(uint16_t* x, int64_t sequences, int64_t heads, int64_t size,
                       const uint16_t* cosines, const uint16_t* sines, int64_t stride) {
    const int64_t half = size / 2;
    const auto turned = [](float value, float other, uint16_t cosine, uint16_t sine) {
        return rounded(widened(rounded(value * widened(cosine))) +
                       widened(rounded(other * widened(sine))));
    };
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        const uint16_t *cosine = cosines + sequence * stride, *sine = sines + sequence * stride;
        for (int64_t head = 0; head < heads; head++, x += size)
            for (int64_t i = 0; i < half; i++) {
                const float left = widened(x[i]), right = widened(x[i + half]);
                x[i] = turned(left, -right, cosine[i], sine[i]);
                x[i + half] = turned(right, left, cosine[i + half], sine[i + half]);
            }
    }
}

// One query (sequences, heads, size) a sequence over `length` keys and values (sequences, groups,
// room, size), which heads share by groups.
extern "C" void attend(const uint16_t* queries, const uint16_t* keys, const uint16_t* values,
                       int64_t sequences, int64_t heads, int64_t groups, int64_t length,
                       int64_t room, int64_t size, float scale, uint16_t* out, int threads) {
    const int64_t shared = heads / groups;
#pragma omp parallel num_threads(threads) if (sequences * heads * length * size > WORTH_A_THREAD)
    {
        std::vector<float> scores(length), sums(size);
#pragma omp for
        for (int64_t head = 0; head < sequences * heads; head++) {
            const int64_t place = head / shared * room * size;
            attend_head(queries + head * size, keys + place, values + place, length, size, scale,
                        scores.data(), sums.data(), out + head * size);
        }
    }
}

struct Expert {
    Weight gate, up, down;
};

// SwiGLU experts, and the sum of what the chosen ones make of each token, weighted. Of the `pairs` of
// a token and an expert, sorted by expert, `tokens[i]` are the i-th expert's; `pair_of` says which
// pair of (tokens, top) it is.
extern "C" void mix(const Expert* const* experts, const int64_t* tokens, int count,
                    const int64_t* pair_of, int64_t pairs, int64_t top, const float* weights,
                    const uint16_t* x, uint16_t* out, int threads, int level) {
    const int64_t hidden = experts[0]->gate.columns, ffn = experts[0]->gate.rows;
    std::vector<uint16_t> inputs(pairs * hidden), gates(pairs * ffn), ups(pairs * ffn);
    for (int64_t i = 0; i < pairs; i++)
        std::copy_n(x + pair_of[i] / top * hidden, hidden, inputs.data() + i * hidden);
    std::vector<Product> outer, inner;
    int64_t first = 0;
    for (int i = 0; i < count; first += tokens[i++]) {
        const uint16_t* from = inputs.data() + first * hidden;
        outer.push_back({experts[i]->gate, from, gates.data() + first * ffn, tokens[i]});
        outer.push_back({experts[i]->up, from, ups.data() + first * ffn, tokens[i]});
        inner.push_back({experts[i]->down, ups.data() + first * ffn,
                         inputs.data() + first * hidden, tokens[i]});
    }
    multiply_products(outer.data(), 2 * count, threads, level);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const int64_t from = pairs * ffn * thread / threads, to = pairs * ffn * (thread + 1) / threads;
        gate(gates.data() + from, ups.data() + from, to - from);
    }
    multiply_products(inner.data(), count, threads, level);
    for (int64_t i = 0; i < pairs; i++) {
        uint16_t* sum = out + pair_of[i] / top * hidden;
        for (int64_t j = 0; j < hidden; j++) {
            const float part = widened(inputs[i * hidden + j]) * weights[pair_of[i]];
            sum[j] = rounded(widened(sum[j]) + widened(rounded(part)));
        }
    }
}

// ------------------------------------------------------------------------ a token through layers

namespace {

void add_to(uint16_t* sums, const std::vector<uint16_t>& parts) {
    for (size_t i = 0; i < parts.size(); i++) sums[i] = rounded(widened(sums[i]) + widened(parts[i]));
}

struct Chosen {
    float weight;
    int64_t expert;
};

// Softmax over all logits, the `top_k` largest, and these as parts of their sum; in order of experts.
std::vector<Chosen> choose(const std::vector<uint16_t>& logits, int64_t top_k) {
    std::vector<Chosen> odds;
    float highest = -__builtin_inff(), total = 0;
    for (uint16_t logit : logits) highest = std::max(highest, widened(logit));
    for (uint16_t logit : logits)
        odds.push_back({exponential(widened(logit) - highest), int64_t(odds.size())});
    // As torch does it, for the same choice where odds are equal.
    std::nth_element(odds.begin(), odds.begin() + top_k - 1, odds.end(),
                     [](const Chosen& a, const Chosen& b) { return a.weight > b.weight; });
    odds.resize(top_k);
    for (const Chosen& each : odds) total += each.weight;
    for (Chosen& each : odds) each.weight /= total;
    std::sort(odds.begin(), odds.end(),
              [](const Chosen& a, const Chosen& b) { return a.expert < b.expert; });
    return odds;
}

}  // namespace

struct Layer {
    const uint16_t *first_norm, *second_norm, *router;  // in bfloat16
    const Expert* experts;
    int64_t expert_count, top_k;
    Weight query, key, value, output;
    int64_t hidden, heads, groups, size;
    float epsilon, scale;
};

// Keys and values (groups, room, size), of `length` tokens, and room for more.
struct Past {
    uint16_t *keys, *values;
    int64_t length, room;
};

namespace {

// Products with the same inputs of one token; matrices with blocks of 0 are not codes but bfloat16.
void project(const std::vector<Product>& products, int threads, int level) {
    const auto in_codes = [](const Product& product) { return product.weight.block > 0; };
    if (std::all_of(products.begin(), products.end(), in_codes))
        return multiply_products(products.data(), products.size(), threads, level);
    for (const Product& product : products) {
        const Weight& weight = product.weight;
        if (in_codes(product))
            multiply_products(&product, 1, threads, level);
        else
            multiply_16bit(reinterpret_cast<const uint16_t*>(weight.codes), weight.rows,
                           weight.columns, product.inputs, 1, product.outputs, threads, level);
    }
}

// What attention adds to a token's state; its key and value join the past.
std::vector<uint16_t> attended(const Layer& layer, const Past& past, const uint16_t* x,
                               const uint16_t* cosines, const uint16_t* sines, int threads,
                               int level) {
    const int64_t hidden = layer.hidden, size = layer.size, groups = layer.groups;
    std::vector<uint16_t> normed(hidden), queries(layer.heads * size), keys(groups * size),
        values(groups * size), found(queries.size()), answer(hidden);
    norm_row(x, layer.first_norm, layer.epsilon, hidden, normed.data());
    project({{layer.query, normed.data(), queries.data(), 1},
             {layer.key, normed.data(), keys.data(), 1},
             {layer.value, normed.data(), values.data(), 1}},
            threads, level);
    rotate(queries.data(), 1, layer.heads, size, cosines, sines, 0);
    rotate(keys.data(), 1, groups, size, cosines, sines, 0);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t place = (group * past.room + past.length) * size;
        std::copy_n(keys.data() + group * size, size, past.keys + place);
        std::copy_n(values.data() + group * size, size, past.values + place);
    }
    attend(queries.data(), past.keys, past.values, 1, layer.heads, groups, past.length + 1,
           past.room, size, layer.scale, found.data(), threads);
    project({{layer.output, found.data(), answer.data(), 1}}, threads, level);
    return answer;
}

// What the chosen experts add.
std::vector<uint16_t> mixed(const Layer& layer, const uint16_t* x, int threads, int level) {
    std::vector<uint16_t> normed(layer.hidden), logits(layer.expert_count), answer(layer.hidden);
    norm_row(x, layer.second_norm, layer.epsilon, layer.hidden, normed.data());
    multiply_rows_16bit({layer.router, layer.expert_count, layer.hidden, normed.data(), 1,
                         logits.data(), 0, layer.expert_count},
                        level);
    std::vector<const Expert*> experts;
    std::vector<float> weights;
    std::vector<int64_t> pairs;
    for (const Chosen& chosen : choose(logits, layer.top_k)) {
        experts.push_back(layer.experts + chosen.expert);
        weights.push_back(chosen.weight);
        pairs.push_back(pairs.size());
    }
    const std::vector<int64_t> one_token(pairs.size(), 1);
    mix(experts.data(), one_token.data(), experts.size(), pairs.data(), pairs.size(), layer.top_k,
        weights.data(), normed.data(), answer.data(), threads, level);
    return answer;
}

}  // namespace

// One token's state `x` (hidden) through layers of Mixtral, in place. `states` are keys and values of
// `length` tokens, (layers, 2, groups, room, size).
extern "C" void decode(const Layer* layers, int count, uint16_t* x, uint16_t* states,
                       int64_t length, int64_t room, const uint16_t* cosines,
                       const uint16_t* sines, int threads, int level) {
    for (const Layer* layer = layers; layer < layers + count; layer++) {
        const int64_t each = layer->groups * room * layer->size;
        const Past past{states, states + each, length, room};
        add_to(x, attended(*layer, past, x, cosines, sines, threads, level));
        add_to(x, mixed(*layer, x, threads, level));
        states += 2 * each;
    }
}
