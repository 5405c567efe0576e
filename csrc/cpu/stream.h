// Stores that go past the caches: a state larger than they are would only push out what is read next.
#pragma once

#include <cstdint>
#include <cstring>

#include "../launch.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace odenet::cpu::ODENET_LEVEL {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Copies bytes, a multiple of kLine; both ends are aligned to kLine.
inline void stream_lines(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < bytes; i += 64) {
    const __m512i x = _mm512_load_si512(static_cast<const char*>(from) + i);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i), x);
  }
#elif defined(__AVX2__)
  for (int64_t i = 0; i < bytes; i += 32) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i), x);
  }
#elif defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16) {
    const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + i), x);
  }
#else
  memcpy(to, from, bytes);
#endif
}

// Streamed stores are ordered before what follows, in this thread's eyes and in others'.
inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace odenet::cpu::ODENET_LEVEL
