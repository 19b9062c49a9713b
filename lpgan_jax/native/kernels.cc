// The two loops that take most of a training step, for CPUs: ring products and ChaCha20.
//
// Both give the very words of the portable code in ring/ and prng.py, faster. Built and registered
// by __init__.py. No branch, address or trip count here depends on a word of an operand. Words are
// read and written as words, so that the order of their bytes does not matter; the digits for AMX
// are bytes, on processors that are little-endian.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AMX_INT8__) && defined(__AVX512VBMI__) && defined(__linux__)
#define HAVE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A vector register: the compiler would keep a wider vector in memory.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

// Runs body(0), ..., body(count - 1) on XLA's own threads and this one. The caller works too and
// waits only for items that another thread has begun, so that a pool without free threads does no
// harm. What a body throws is thrown here, once no thread is in a body any more.
void ParallelFor(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> body) {
  struct Shared {
    std::function<void(int64_t)> body;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    int64_t done = 0;
    std::exception_ptr thrown;

    void Work() {
      int64_t own = 0;
      std::exception_ptr own_thrown;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++own) {
        try {
          body(i);
        } catch (...) {
          own_thrown = std::current_exception();
        }
      }
      if (own == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      if (own_thrown) thrown = own_thrown;
      done += own;
      if (done == count) finished.notify_all();
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->body = std::move(body);
  shared->count = count;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Work(); });
  } catch (const std::bad_alloc&) {  // then those do it that have been called
  }
  shared->Work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
  if (shared->thrown) std::rethrow_exception(shared->thrown);
}

// No exception may reach XLA. Those of this file all mean that memory has run out.
ffi::Error OutOfMemory(const std::exception& error) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
}

// XLA gets the memory of its buffers anew for every run of a program. In huge pages, which Linux
// gives to those who ask, the first touch of it costs a fraction.
void AskForHugePages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = ((uintptr_t)data + kPage - 1) / kPage * kPage;
  const uintptr_t last = ((uintptr_t)data + bytes) / kPage * kPage;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Ring products ----------------------------------------------------------------------------------
//
// out[m, n] = sum_k a[m, k] b[k, n] modulo 2^64 or 2^32, where the address of a[m, k] is the sum of
// an offset for m and one for k, and so for b and out. An im2col matrix is such a view of an image.

using Offsets = std::vector<int64_t>;

constexpr int64_t kTile = 16;        // rows or columns of a tile
constexpr int64_t kBlock = 32;       // rows or columns of a block: two tiles
constexpr int64_t kDepth = 512;      // of K in one pass
constexpr int64_t kResident = 256;   // rows or columns that stay in the second-level cache

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The offsets of a row-major walk over axes of the given sizes and strides.
Offsets Walk(ffi::Span<const int64_t> sizes, ffi::Span<const int64_t> strides) {
  Offsets offsets{0};
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    Offsets longer;
    longer.reserve(offsets.size() * sizes[axis]);
    for (int64_t offset : offsets)
      for (int64_t i = 0; i < sizes[axis]; ++i) longer.push_back(offset + i * strides[axis]);
    offsets = std::move(longer);
  }
  return offsets;
}

bool Contiguous(const int64_t* offsets, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (offsets[i] != offsets[0] + i) return false;
  return true;
}

#ifdef HAVE_AMX
// 8 vectors of 8 words to their transpose.
inline void Transpose8(__m512i v[8]) {
  __m512i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + j] = _mm512_shuffle_i64x2(t[i + j], t[i + j + 2], 0x88);
      v[i + j + 2] = _mm512_shuffle_i64x2(t[i + j], t[i + j + 2], 0xdd);
    }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i64x2(v[j], v[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_i64x2(v[j], v[j + 4], 0xdd);
  }
  for (int j = 0; j < 8; ++j) v[j] = t[j];
}

#endif

// 8 words from each of 8 places, as columns of 8 lines.
template <typename Word>
inline void Transpose8x8(const Word* base, const int64_t* places, Word* lines, int64_t stride) {
#ifdef HAVE_AMX
  if constexpr (sizeof(Word) == 8) {
    __m512i v[8];
    for (int k = 0; k < 8; ++k) v[k] = _mm512_loadu_si512(base + places[k]);
    Transpose8(v);
    for (int i = 0; i < 8; ++i) _mm512_storeu_si512(lines + i * stride, v[i]);
    return;
  }
#endif
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 8; ++i) lines[i * stride + k] = base[places[k] + i];
}

// A block of an operand as a dense matrix of the given stride: lines (rows of a, columns of b)
// along K, zero padded.
template <typename Word>
void Gather(const Word* base, const int64_t* lines, int64_t count, const int64_t* inner,
            int64_t depth, int64_t padded_count, int64_t padded_depth, int64_t stride,
            Word* dense) {
  int64_t run = 0;  // the longest power of two of neighbours along K, up to 64
  for (int64_t length = 64; length >= 4 && run == 0; length /= 2) {
    bool all = depth % length == 0;
    for (int64_t k = 0; all && k < depth; k += length) all = Contiguous(inner + k, length);
    if (all) run = length;
  }
  if (run) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < depth; k += run)
        std::memcpy(dense + i * stride + k, base + lines[i] + inner[k], run * sizeof(Word));
  } else if (count % 8 == 0 && Contiguous(lines, count)) {
    for (int64_t i = 0; i < count; i += 8) {
      const Word* from = base + lines[i];
      Word* to = dense + i * stride;
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8) Transpose8x8(from, inner + k, to + k, stride);
      for (; k < depth; ++k)
        for (int64_t line = 0; line < 8; ++line) to[line * stride + k] = from[inner[k] + line];
    }
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < depth; ++k) dense[i * stride + k] = base[lines[i] + inner[k]];
  }
  if (padded_depth > depth)
    for (int64_t i = 0; i < count; ++i)
      std::memset(dense + i * stride + depth, 0, (padded_depth - depth) * sizeof(Word));
  for (int64_t i = count; i < padded_count; ++i)
    std::memset(dense + i * stride, 0, padded_depth * sizeof(Word));
}

// The view of a product's operands and result.
template <typename Word>
struct Product {
  const Word *a, *b;
  Word* out;
  const int64_t *a_rows, *a_inner, *b_inner, *b_columns, *out_rows, *out_columns;
  int64_t rows, inner, columns;
};

template <typename Word>
void Add(const Product<Word>& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
         const Word* block, int64_t stride, bool first) {
  const bool dense = Contiguous(p.out_columns + column, columns);
  for (int64_t i = 0; i < rows; ++i) {
    const Word* from = block + i * stride;
    Word* to = p.out + p.out_rows[row + i];
    if (dense) {
      to += p.out_columns[column];
      if (first) std::memcpy(to, from, columns * sizeof(Word));
      else for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        Word& word = to[p.out_columns[column + j]];
        word = first ? from[j] : word + from[j];
      }
    }
  }
}

// On vector units: a tile of the product in registers, two vectors wide, one row of b at a time.
// 16 sums in 32 registers, or 8 in 16 (where a product takes some of its own).
constexpr int64_t kVectorRows = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kVectorDepth = 256;

template <typename Word>
void VectorProduct(const Product<Word>& p, int64_t first_row, int64_t last_row) {
  // Vectors of 16 bytes multiply slower than one by one: there, a "vector" is one word.
  constexpr int64_t kVectorWords = kVectorBytes > 16 ? kVectorBytes / sizeof(Word) : 1;
  constexpr int64_t kVectorColumns = 2 * kVectorWords;
  typedef Word Vector
      __attribute__((vector_size(kVectorWords * sizeof(Word)), aligned(sizeof(Word)), may_alias));
  const int64_t longest = std::min(kVectorDepth, p.inner);
  const int64_t widest = RoundUp(std::min(kResident, p.columns), kVectorColumns);
  std::vector<Word> packed(widest * longest), line(kVectorColumns * longest);
  std::vector<Word> left(kVectorRows * longest);
  for (int64_t first = 0; first < p.columns; first += kResident) {
    const int64_t width = std::min(kResident, p.columns - first);
    for (int64_t k = 0; k < p.inner; k += kVectorDepth) {
      const int64_t depth = std::min(kVectorDepth, p.inner - k);
      for (int64_t column = 0; column < width; column += kVectorColumns) {
        const int64_t count = std::min(kVectorColumns, width - column);
        const int64_t* columns = p.b_columns + first + column;
        Word* panel = packed.data() + column * depth;
        if (count == kVectorColumns && Contiguous(columns, count)) {
          for (int64_t i = 0; i < depth; ++i)
            std::memcpy(panel + i * kVectorColumns, p.b + p.b_inner[k + i] + columns[0],
                        kVectorColumns * sizeof(Word));
        } else {
          Gather(p.b, columns, count, p.b_inner + k, depth, kVectorColumns, depth, depth,
                 line.data());
          for (int64_t i = 0; i < depth; ++i)
            for (int64_t j = 0; j < kVectorColumns; ++j)
              panel[i * kVectorColumns + j] = line[j * depth + i];
        }
      }
      for (int64_t row = first_row; row < last_row; row += kVectorRows) {
        const int64_t rows = std::min(kVectorRows, last_row - row);
        Gather(p.a, p.a_rows + row, rows, p.a_inner + k, depth, kVectorRows, depth, depth,
               left.data());
        for (int64_t column = 0; column < width; column += kVectorColumns) {
          const Word* panel = packed.data() + column * depth;
          Vector total[kVectorRows][2] = {};
          for (int64_t i = 0; i < depth; ++i) {
            const Vector b0 = *(const Vector*)(panel + i * kVectorColumns);
            const Vector b1 = *(const Vector*)(panel + i * kVectorColumns + kVectorWords);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kVectorRows; ++r) {
              const Word a = left[r * depth + i];
              total[r][0] += a * b0;
              total[r][1] += a * b1;
            }
          }
          Add(p, row, rows, first + column, std::min(kVectorColumns, width - column),
              (const Word*)total, kVectorColumns, k == 0);
        }
      }
    }
  }
}

// Few columns: rows of a, one dot product each. (A tile would be mostly padding.)
constexpr int64_t kFewColumns = 4;

template <typename Word>
void NarrowProduct(const Product<Word>& p, int64_t first_row, int64_t last_row) {
  constexpr int64_t kDepthAtOnce = 1024;
  std::vector<Word> left(kVectorRows * kDepthAtOnce), right(p.columns * kDepthAtOnce);
  for (int64_t k = 0; k < p.inner; k += kDepthAtOnce) {
    const int64_t depth = std::min(kDepthAtOnce, p.inner - k);
    Gather(p.b, p.b_columns, p.columns, p.b_inner + k, depth, p.columns, depth, depth,
           right.data());
    for (int64_t row = first_row; row < last_row; row += kVectorRows) {
      const int64_t rows = std::min(kVectorRows, last_row - row);
      Gather(p.a, p.a_rows + row, rows, p.a_inner + k, depth, rows, depth, depth, left.data());
      Word totals[kVectorRows * kFewColumns];
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t column = 0; column < p.columns; ++column) {
          Word total = 0;
          for (int64_t i = 0; i < depth; ++i)
            total += left[r * depth + i] * right[column * depth + i];
          totals[r * p.columns + column] = total;
        }
      Add(p, row, rows, 0, p.columns, totals, p.columns, k == 0);
    }
  }
}

#ifdef HAVE_AMX

// On matrix units: balanced 8-bit digits, a = sum_i a_i 2^(8i). The product is
// sum_s 2^(8s) sum_{i+j=s} a_i b_j for s < 8 (4 in words of 32 bits). A sum of 8 K products below
// 2^14 in size needs 32 bits for K < 2^14 (beyond, passes over K keep it there).

// Linux hands out the tile registers on request, to all threads of the process at once.
bool AmxAllowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return allowed;
}

// All eight tiles have 16 rows of 64 bytes. (A constant: some compilers' headers do not tell them
// that the instruction reads more of it than one word.)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// 16 vectors of 16 32-bit words to their transpose.
inline void Transpose16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xdd);
    v[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// The digits of 64 words: words[d] has digit d of each.
template <typename Word>
inline void ByDigit(const Word* from, __m512i words[sizeof(Word)]) {
  alignas(64) static const uint8_t kOf64[64] = {
      0, 8, 16, 24, 32, 40, 48, 56, 1, 9,  17, 25, 33, 41, 49, 57, 2, 10, 18, 26, 34, 42,
      50, 58, 3, 11, 19, 27, 35, 43, 51, 59, 4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29,
      37, 45, 53, 61, 6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63};
  alignas(64) static const uint8_t kOf32[64] = {
      0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9,  13, 17, 21,
      25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46,
      50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
  const __m512i by_digit = _mm512_load_si512(sizeof(Word) == 8 ? kOf64 : kOf32);
  const __m512i halves = _mm512_set1_epi8((char)0x80);
  for (size_t k = 0; k < sizeof(Word); ++k) {
    // Adding 128 to each digit makes it an unsigned byte; the xor takes the 128 away again.
    __m512i x = _mm512_loadu_si512(from + k * (64 / sizeof(Word)));
    x = sizeof(Word) == 8 ? _mm512_add_epi64(x, halves) : _mm512_add_epi32(x, halves);
    words[k] = _mm512_permutexvar_epi8(by_digit, _mm512_xor_si512(x, halves));
  }
  if constexpr (sizeof(Word) == 8) {
    Transpose8(words);
  } else {  // of lanes of 16 bytes
    const __m512i a = _mm512_shuffle_i64x2(words[0], words[1], 0x44);
    const __m512i b = _mm512_shuffle_i64x2(words[2], words[3], 0x44);
    const __m512i c = _mm512_shuffle_i64x2(words[0], words[1], 0xee);
    const __m512i d = _mm512_shuffle_i64x2(words[2], words[3], 0xee);
    words[0] = _mm512_shuffle_i64x2(a, b, 0x88);
    words[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    words[2] = _mm512_shuffle_i64x2(c, d, 0x88);
    words[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
  }
}

// 16 dense lines as digits: tiles [digit][depth / 64] of 16 lines x 64 digits of K; for b, each
// tile as the instruction wants it, four digits of K to a 32-bit word and transposed.
template <typename Word>
void Digits(const Word* dense, int64_t stride, int64_t depth, bool transposed, int8_t* tiles) {
  constexpr int64_t kDigits = sizeof(Word);
  const int64_t chunks = depth / 64;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t line = 0; line < kTile; ++line) {
      __m512i words[kDigits];
      ByDigit(dense + line * stride + chunk * 64, words);
      for (int64_t digit = 0; digit < kDigits; ++digit)
        _mm512_store_si512(tiles + (digit * chunks + chunk) * 1024 + line * 64, words[digit]);
    }
  if (!transposed) return;
  for (int64_t tile = 0; tile < kDigits * chunks; ++tile) {
    __m512i* rows = (__m512i*)(tiles + tile * 1024);
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(rows + i);
    Transpose16(v);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(rows + i, v[i]);
  }
}

// Adds 16 sums, shifted, to as many words of a block; the first of them are stored.
inline void AddShifted(const int32_t* sums, int shift, uint64_t* to, bool first) {
  for (int j = 0; j < kTile; j += 8) {
    const __m512i sum = _mm512_cvtepi32_epi64(_mm256_load_si256((const __m256i*)(sums + j)));
    const __m512i before = first ? _mm512_setzero_si512() : _mm512_load_si512(to + j);
    _mm512_store_si512(to + j, _mm512_add_epi64(before, _mm512_slli_epi64(sum, shift)));
  }
}

inline void AddShifted(const int32_t* sums, int shift, uint32_t* to, bool first) {
  const __m512i sum = _mm512_load_si512(sums);
  const __m512i before = first ? _mm512_setzero_si512() : _mm512_load_si512(to);
  _mm512_store_si512(to, _mm512_add_epi32(before, _mm512_slli_epi32(sum, shift)));
}

// 32 x 32 words from the digits of two pairs of tiles.
template <typename Word>
void DigitBlock(const int8_t* a0, const int8_t* a1, const int8_t* b0, const int8_t* b1,
                int64_t chunks, Word* block) {
  alignas(64) int32_t sums[4][kTile][kTile];
  asm volatile("" ::: "memory");  // the digits are written by now: tile loads do not say they read
  for (int s = 0; s < (int)sizeof(Word); ++s) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i <= s; ++i)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t left = (i * chunks + chunk) * 1024;
        const int64_t right = ((s - i) * chunks + chunk) * 1024;
        _tile_loadd(4, a0 + left, 64);
        _tile_loadd(6, b0 + right, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b1 + right, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a1 + left, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int part = 0; part < 4; ++part)
      for (int i = 0; i < kTile; ++i) {
        Word* to = block + (part / 2 * kTile + i) * kBlock + part % 2 * kTile;
        AddShifted(sums[part][i], 8 * s, to, s == 0);
      }
  }
}

struct Aligned {
  explicit Aligned(size_t bytes) : data((int8_t*)std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  int8_t* data;
};

// Rows first_row to last_row, or with `by_columns` those columns: the other side's digits stay in
// cache, kResident lines at a time, while these pass by.
template <typename Word>
void DigitProduct(const Product<Word>& p, bool by_columns, int64_t first, int64_t last) {
  const int64_t longest = std::min(kDepth, RoundUp(p.inner, 64));
  const int64_t others = by_columns ? p.rows : p.columns;
  // Lines a power of two apart would meet in the same places of the first-level cache.
  const int64_t stride = longest + 8;
  constexpr int64_t kDigits = sizeof(Word);
  Aligned dense(kTile * stride * sizeof(Word)), passing(2 * kTile * longest * kDigits);
  Aligned resident(kResident * longest * kDigits), block(kBlock * kBlock * sizeof(Word));
  _tile_loadconfig(&kTileConfig);
  for (int64_t other = 0; other < others; other += kResident) {
    const int64_t width = std::min(kResident, others - other);
    for (int64_t k = 0; k < p.inner; k += kDepth) {
      const int64_t depth = std::min(kDepth, p.inner - k), padded = RoundUp(depth, 64);
      const int64_t bytes = kTile * padded * kDigits;  // of the digits of 16 lines
      auto pack = [&](bool of_a, int64_t line, int64_t count, int8_t* tiles) {
        for (int64_t i = 0; i < kBlock; i += kTile, tiles += bytes) {
          const int64_t lines = std::min(kTile, count - i);
          if (lines <= 0) {  // a tile of padding
            std::memset(tiles, 0, bytes);
            continue;
          }
          Gather(of_a ? p.a : p.b, (of_a ? p.a_rows : p.b_columns) + line + i, lines,
                 (of_a ? p.a_inner : p.b_inner) + k, depth, kTile, padded, stride,
                 (Word*)dense.data);
          Digits((const Word*)dense.data, stride, padded, !of_a, tiles);
        }
      };
      for (int64_t i = 0; i < width; i += kBlock)
        pack(by_columns, other + i, std::min(kBlock, width - i), resident.data + i / kTile * bytes);
      for (int64_t line = first; line < last; line += kBlock) {
        const int64_t lines = std::min(kBlock, last - line);
        pack(!by_columns, line, lines, passing.data);
        for (int64_t i = 0; i < width; i += kBlock) {
          const int8_t* still = resident.data + i / kTile * bytes;
          const int8_t* a = by_columns ? still : passing.data;
          const int8_t* b = by_columns ? passing.data : still;
          DigitBlock(a, a + bytes, b, b + bytes, padded / 64, (Word*)block.data);
          const int64_t count = std::min(kBlock, width - i);
          if (by_columns)
            Add(p, other + i, count, line, lines, (const Word*)block.data, kBlock, k == 0);
          else
            Add(p, line, lines, other + i, count, (const Word*)block.data, kBlock, k == 0);
        }
      }
    }
  }
  _tile_release();
}

// Whether the padded digits take less time than 5 words a cycle on the vector units (of 32 bits,
// 10: which have 10 products of digits instead of 36).
template <typename Word>
bool DigitsPay(const Product<Word>& p) {
  if (!AmxAllowed()) return false;
  constexpr bool kHalf = sizeof(Word) == 4;
  const double digits = (kHalf ? 1.0 / 80 : 1.0 / 25) * RoundUp(p.rows, 32) *
                        RoundUp(p.inner, 64) * RoundUp(p.columns, 32);
  const double packing = (kHalf ? 2.0 : 3.0) * p.inner * (p.rows + p.columns);
  return digits + packing < (kHalf ? 1.0 / 10 : 1.0 / 5) * p.rows * p.inner * p.columns;
}

#endif  // HAVE_AMX

// The product, in equal parts for all threads, once for each start of its views.
template <typename Word>
void Products(ffi::ThreadPool& pool, Product<Word> p, ffi::Span<const int64_t> starts) {
  const int64_t batch = starts.size() / 3;
  // Few rows are as good as few columns, of the transposed product.
  const bool transposed = p.rows <= kFewColumns && p.columns > p.rows;
  if (transposed) {
    std::swap(p.a, p.b);
    std::swap(p.a_rows, p.b_columns);
    std::swap(p.a_inner, p.b_inner);
    std::swap(p.out_rows, p.out_columns);
    std::swap(p.rows, p.columns);
  }
  bool digits = false, by_columns = false;
#ifdef HAVE_AMX
  digits = DigitsPay(p);
  by_columns = digits && p.columns > p.rows;
#endif
  const int64_t lines = by_columns ? p.columns : p.rows;
  const int64_t threads = pool.num_threads();
  // Equal parts, one a thread, in whole blocks.
  const int64_t wanted = std::max<int64_t>(1, (threads + batch - 1) / batch);
  const int64_t part = RoundUp(std::max<int64_t>(1, (lines + wanted - 1) / wanted), kBlock);
  const int64_t parts = std::max<int64_t>(1, (lines + part - 1) / part);
  ParallelFor(pool, batch * parts, [&](int64_t item) {
    Product<Word> one = p;
    const int64_t* start = starts.begin() + item / parts * 3;
    one.a += start[transposed], one.b += start[!transposed], one.out += start[2];
    const int64_t first = item % parts * part, last = std::min(lines, first + part);
#ifdef HAVE_AMX
    if (digits) return DigitProduct(one, by_columns, first, last);
#endif
    if (p.columns <= kFewColumns) return NarrowProduct(one, first, last);
    VectorProduct(one, first, last);
  });
}

ffi::Error RingProduct(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                       ffi::Result<ffi::AnyBuffer> out, ffi::Span<const int64_t> rows,
                       ffi::Span<const int64_t> rows_a, ffi::Span<const int64_t> rows_out,
                       ffi::Span<const int64_t> inner, ffi::Span<const int64_t> inner_a,
                       ffi::Span<const int64_t> inner_b, ffi::Span<const int64_t> columns,
                       ffi::Span<const int64_t> columns_b, ffi::Span<const int64_t> columns_out,
                       ffi::Span<const int64_t> starts) try {
  const Offsets a_rows = Walk(rows, rows_a), out_rows = Walk(rows, rows_out);
  const Offsets a_inner = Walk(inner, inner_a), b_inner = Walk(inner, inner_b);
  if (out->element_count() == 0) return ffi::Error::Success();
  AskForHugePages(out->untyped_data(), out->size_bytes());
  const Offsets b_columns = Walk(columns, columns_b), out_columns = Walk(columns, columns_out);
  if (a_inner.empty()) {  // an empty sum
    std::memset(out->untyped_data(), 0, out->size_bytes());
    return ffi::Error::Success();
  }
  auto run = [&](auto word) {
    using Word = decltype(word);
    const Product<Word> p{(const Word*)a.untyped_data(), (const Word*)b.untyped_data(),
                          (Word*)out->untyped_data(), a_rows.data(), a_inner.data(),
                          b_inner.data(), b_columns.data(), out_rows.data(), out_columns.data(),
                          (int64_t)a_rows.size(), (int64_t)a_inner.size(),
                          (int64_t)b_columns.size()};
    Products(pool, p, starts);
  };
  if (out->element_type() == ffi::U64) run(uint64_t{});
  else run(uint32_t{});
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return OutOfMemory(error);
}

// ChaCha20 (RFC 8439) ----------------------------------------------------------------------------

constexpr int64_t kLanes = kVectorBytes / 4;  // blocks at a time
constexpr int64_t kChunkBlocks = 1024;        // _CHUNK_BLOCKS of prng.py, which lays words out
typedef uint32_t Lanes __attribute__((vector_size(kVectorBytes)));

inline Lanes Rotate(Lanes x, int bits) { return (x << bits) | (x >> (32 - bits)); }

inline void QuarterRound(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
  a += b, d = Rotate(d ^ a, 16);
  c += d, b = Rotate(b ^ c, 12);
  a += b, d = Rotate(d ^ a, 8);
  c += d, b = Rotate(b ^ c, 7);
}

// Key stream blocks counter, counter + 1, ..., one a lane: words[i] holds word i of each.
inline void Blocks(const uint32_t* head, uint32_t counter, Lanes words[16]) {
  Lanes start[16];
  for (int i = 0; i < 16; ++i) start[i] = Lanes{} + head[i];
  for (int lane = 0; lane < kLanes; ++lane) start[12][lane] = counter + lane;
  for (int i = 0; i < 16; ++i) words[i] = start[i];
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) QuarterRound(words[i], words[4 + i], words[8 + i], words[12 + i]);
    for (int i = 0; i < 4; ++i)
      QuarterRound(words[i], words[4 + (i + 1) % 4], words[8 + (i + 2) % 4],
                   words[12 + (i + 3) % 4]);
  }
  for (int i = 0; i < 16; ++i) words[i] += start[i];
}

// The first `limit` words of the chunk of `blocks` blocks from block `counter` on: the first word
// of all of its blocks, then the second, ...; a word of 64 bits has word i above word i + 8.
template <typename Type>
void Chunk(const uint32_t* head, int64_t counter, int64_t blocks, int64_t limit, Type* out) {
  constexpr int kPerBlock = 64 / sizeof(Type);
  for (int64_t block = 0; block < blocks; block += kLanes) {
    Lanes words[16];
    Blocks(head, (uint32_t)(counter + block), words);
    const int64_t lanes = std::min(kLanes, blocks - block);
    for (int i = 0; i < kPerBlock; ++i) {
      const int64_t at = i * blocks + block;
      const int64_t count = std::min(lanes, limit - at);
      if (count <= 0) break;  // the words that follow lie further on
      typedef Type Line __attribute__((vector_size(kLanes * sizeof(Type))));
      Line line = __builtin_convertvector(words[i], Line);
      if constexpr (sizeof(Type) == 8)
        line = line << 32 | __builtin_convertvector(words[i + 8], Line);
      std::memcpy(out + at, &line, count * sizeof(Type));
    }
  }
}

template <typename Type>
void Stream(ffi::ThreadPool& pool, const uint32_t* keys, int64_t batch, const uint32_t* nonce,
            int64_t size, Type* out) {
  constexpr int64_t kPerBlock = 64 / sizeof(Type), kChunk = kChunkBlocks * kPerBlock;
  const int64_t blocks = (size + kPerBlock - 1) / kPerBlock;
  const int64_t chunks = std::max<int64_t>(1, (size + kChunk - 1) / kChunk);
  ParallelFor(pool, batch * chunks, [=](int64_t item) {
    const int64_t chunk = item % chunks;
    const uint32_t* key = keys + item / chunks * 8;
    uint32_t head[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    std::copy(key, key + 8, head + 4);
    std::copy(nonce, nonce + 3, head + 13);
    Type* to = out + item / chunks * size;
    if (chunks == 1) return Chunk(head, 0, blocks, size, to);
    // The last chunk ends where the result ends, and takes the place of some words before it.
    const int64_t last = size - kChunk, start = std::min(chunk * kChunk, last);
    const int64_t limit = chunk + 1 < chunks ? std::min(kChunk, last - start) : kChunk;
    Chunk(head, chunk * kChunkBlocks, kChunkBlocks, limit, to + start);
  });
}

ffi::Error ChaCha20(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> keys, ffi::Buffer<ffi::U32> nonce,
                    ffi::Result<ffi::AnyBuffer> out) try {
  const int64_t batch = keys.element_count() / 8;
  const int64_t size = batch ? out->element_count() / batch : 0;
  if (size == 0) return ffi::Error::Success();
  AskForHugePages(out->untyped_data(), out->size_bytes());
  const uint32_t *key = keys.typed_data(), *head = nonce.typed_data();
  if (out->element_type() == ffi::U64)
    Stream(pool, key, batch, head, size, (uint64_t*)out->untyped_data());
  else
    Stream(pool, key, batch, head, size, (uint32_t*)out->untyped_data());
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return OutOfMemory(error);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lpgan_ring_product, RingProduct,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Attr<ffi::Span<const int64_t>>("rows")
        .Attr<ffi::Span<const int64_t>>("rows_a")
        .Attr<ffi::Span<const int64_t>>("rows_out")
        .Attr<ffi::Span<const int64_t>>("inner")
        .Attr<ffi::Span<const int64_t>>("inner_a")
        .Attr<ffi::Span<const int64_t>>("inner_b")
        .Attr<ffi::Span<const int64_t>>("columns")
        .Attr<ffi::Span<const int64_t>>("columns_b")
        .Attr<ffi::Span<const int64_t>>("columns_out")
        .Attr<ffi::Span<const int64_t>>("starts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lpgan_chacha20, ChaCha20,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::AnyBuffer>());
